"""Every operator in csrc/library.cpp has all that belongs to one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import compact_ops
from compact_ops import reference

ROOT = Path(__file__).parents[2]
OPS = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc/library.cpp").read_text())


def _sources(pattern: str) -> str:
    return "\n".join(path.read_text() for path in sorted(ROOT.glob(pattern)))


def test_the_list_is_read() -> None:
    """The pattern finds the schemas."""
    assert "linear_token_stats" in OPS and len(OPS) >= 8


@pytest.mark.parametrize("op", OPS)
def test_operator_is_complete(op: str) -> None:
    """Kernel for CPU, source for CUDA, fake, public function with docstring, reference, test."""
    name = f"compact::{op}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"), "CPU kernel"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta"), "fake"
    assert f'"{op}"' in _sources("csrc/ops/*_cuda.cu"), "CUDA kernel"
    public = op.removesuffix("_backward")
    function = getattr(compact_ops, public)
    assert "Args:" in function.__doc__ and "Raises:" in function.__doc__, "docstring"
    assert callable(getattr(reference, public)), "reference"
    assert f"{public}(" in _sources("tests/ops/test_*.py"), "test"
