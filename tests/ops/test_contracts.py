"""Every operator in csrc/library.cpp has all the files and registrations that it needs."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import compact_ops
from compact_ops import reference
from compact_ops.testing import CPU_ONLY, SAMPLES

ROOT = Path(__file__).parents[2]
SCHEMAS = (ROOT / "csrc/library.cpp").read_text()
ENTRIES = ROOT / "tools/abi_entries.py"
DEVICES = runpy.run_path(str(ENTRIES))["expected"]()
OPS = list(DEVICES)
# OP_backward and OP_fused belong to the public function OP.
PUBLIC = sorted(SAMPLES, key=len, reverse=True)


def _measured() -> set[str]:
    """Public operators with a benchmark: in a shape of the case `ops`, or imported by a case.

    The sources are read, because tools/abi_check.sh runs this test where `compact` cannot be
    imported.
    """
    runner = (ROOT / "benchmarks/run.py").read_text()
    cases = ast.literal_eval(re.search(r"^CASES = (\([^)]*\))", runner, re.M)[1])
    texts = {case: (ROOT / f"benchmarks/{case}.py").read_text() for case in cases}
    imported = {
        alias.name
        for text in texts.values()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and node.module == "compact_ops"
        for alias in node.names
    }
    return imported | set(re.findall(r'"op": "(\w+)"', texts["ops"]))


def test_the_list_is_read() -> None:
    """The pattern finds the schemas: as many as there are definitions."""
    assert len(OPS) == len(set(OPS)) == SCHEMAS.count("m.def(") >= 10


@pytest.mark.parametrize("op", OPS)
def test_operator_is_complete(op: str) -> None:
    """Kernels (on CUDA but for CPU_ONLY), fake, public docstring, reference, test, benchmark."""
    name = f"compact::{op}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"), "CPU kernel"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta"), "fake"
    assert ("CUDA" in DEVICES[op]) != op.startswith(CPU_ONLY), "CUDA kernel"
    public = next((p for p in PUBLIC if op.startswith(p)), None)
    assert public is not None, f"{op} belongs to no entry of SAMPLES in compact_ops/testing.py"
    function = getattr(compact_ops, public)
    assert "Args:" in function.__doc__ and "Raises:" in function.__doc__, "docstring"
    assert callable(getattr(reference, public)), "reference"
    assert (ROOT / f"tests/ops/test_{public}.py").exists(), "test"
    assert public in _measured(), "benchmark: a shape of benchmarks/ops.py, or a case of its own"


def test_the_abi_check_expects_the_cuda_kernels_that_exist() -> None:
    """With the CPU library in the place of the CUDA library, every CUDA kernel is missing."""
    library = ROOT / "compact_ops/libcompact_cpu.so"
    done = subprocess.run(
        [sys.executable, str(ENTRIES), str(library), str(library)], capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines() == [
        f"{op}: expected kernels on ['CPU', 'CUDA'], got ['CPU']"
        for op in OPS
        if not op.startswith(CPU_ONLY)
    ]


@pytest.mark.parametrize("op", OPS)
def test_a_comment_explains_the_schema(op: str) -> None:
    """In library.cpp a comment precedes each definition."""
    before = SCHEMAS[: re.search(rf'm\.def\(\s*"{op}\(', SCHEMAS).start()].rstrip()
    assert before.splitlines()[-1].lstrip().startswith("//")
