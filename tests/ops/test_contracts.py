"""Every operator in csrc/library.cpp has all the files and registrations that it needs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import compact_ops
from compact_ops import reference
from compact_ops.testing import CPU_ONLY, SAMPLES

ROOT = Path(__file__).parents[2]
SCHEMAS = (ROOT / "csrc/library.cpp").read_text()
OPS = re.findall(r'm\.def\(\s*"(\w+)\(', SCHEMAS)
# OP_backward and OP_fused belong to the public function OP.
PUBLIC = sorted(SAMPLES, key=len, reverse=True)


def _sources(pattern: str) -> str:
    return "\n".join(path.read_text() for path in sorted(ROOT.glob(pattern)))


def test_the_list_is_read() -> None:
    """The pattern finds the schemas: as many as there are definitions."""
    assert len(OPS) == len(set(OPS)) == SCHEMAS.count("m.def(") >= 10


@pytest.mark.parametrize("op", OPS)
def test_operator_is_complete(op: str) -> None:
    """Kernels (on CUDA but for CPU_ONLY), fake, public docstring, reference, test, benchmark."""
    name = f"compact::{op}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"), "CPU kernel"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta"), "fake"
    on_cuda = re.search(rf'm\.impl\(\s*"{op}"', _sources("csrc/ops/*_cuda.cu"))
    assert bool(on_cuda) != op.startswith(CPU_ONLY), "CUDA kernel"
    public = next(p for p in PUBLIC if op.startswith(p))
    function = getattr(compact_ops, public)
    assert "Args:" in function.__doc__ and "Raises:" in function.__doc__, "docstring"
    assert callable(getattr(reference, public)), "reference"
    assert (ROOT / f"tests/ops/test_{public}.py").exists(), "test"
    assert re.search(rf"\b{public}\b", _sources("benchmarks/*.py")), "benchmark"


@pytest.mark.parametrize("op", OPS)
def test_a_comment_explains_the_schema(op: str) -> None:
    """In library.cpp a comment precedes each definition."""
    before = SCHEMAS[: re.search(rf'm\.def\(\s*"{op}\(', SCHEMAS).start()].rstrip()
    assert before.splitlines()[-1].lstrip().startswith("//")
