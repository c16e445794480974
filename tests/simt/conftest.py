"""The implementations that the operator tests of this folder run on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


def build_simt() -> Path:
    """Builds the harness and compact_simt (half a minute the first time); returns the folder."""
    folder = ROOT / "build/simt"
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DCOMPACT_SIMT=ON"]
    configure += ["-DCOMPACT_WERROR=ON"]
    configure.append(f"-DPython_EXECUTABLE={sys.executable}")
    build = ["cmake", "--build", str(folder), "-t", "compact_simt", "simt_kernels"]
    # Workers of pytest-xdist wait for each other.
    lock = ROOT / "build/simt.lock"
    lock.parent.mkdir(exist_ok=True)
    for command in (configure, build):
        subprocess.run(
            ["flock", str(lock), *command], check=True, env=env, stdout=subprocess.DEVNULL
        )
    return folder


@pytest.fixture(scope="session")
def simt_folder() -> Path:
    """The folder of libcompact_simt.so and simt_kernels."""
    return build_simt()


@pytest.fixture(params=["cpu", "simt", pytest.param("cuda", marks=pytest.mark.cuda)])
def impl(request: pytest.FixtureRequest) -> tuple[Any, Callable[[Any], Any]]:
    """(namespace of the operators, function that moves a tensor to where they run)."""
    import compact_ops

    assert compact_ops.backend() == "native"
    if request.param == "simt":
        folder = request.getfixturevalue("simt_folder")
        torch.ops.load_library(str(folder / "libcompact_simt.so"))
        return torch.ops.compact_simt, lambda t: t
    device = torch.device(request.param)
    return torch.ops.compact, lambda t: t.to(device) if isinstance(t, torch.Tensor) else t
