"""The CUDA library without a GPU: it loads, has every entry, needs stable symbols only."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from compact_ops.testing import CPU_ONLY

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "build/cuda/libcompact_cuda.so"
CPU = ROOT / "compact_ops/libcompact_cpu.so"

# Without the library these tests fail; `make cuda-checks` runs them, `make test` does not.
built = pytest.mark.nvcc


def operators() -> list[str]:
    """Names of all operators in csrc/library.cpp."""
    text = (ROOT / "csrc/library.cpp").read_text()
    return re.findall(r'm\.def\(\s*"(\w+)\(', text)


@built
def test_it_loads_into_a_torch_without_cuda_and_registers_every_operator() -> None:
    code = (
        "import torch\n"
        f"torch.ops.load_library({str(CPU)!r}); torch.ops.load_library({str(CUDA)!r})\n"
        f"for op in {operators()!r}:\n"
        "    has = torch._C._dispatch_has_kernel_for_dispatch_key('compact::' + op, 'CUDA')\n"
        f"    assert has != op.startswith({CPU_ONLY!r}), op\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.version_info < (3, 11), reason="torch-abi-audit needs Python 3.11")
@pytest.mark.parametrize("library", [CPU, pytest.param(CUDA, marks=built)])
def test_it_needs_the_stable_interface_of_torch_only(library: Path) -> None:
    audit = subprocess.run(
        [sys.executable, "-m", "torch_abi_audit.cli", library, "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    (found,) = json.loads(audit.stdout)["bundled_libs"]
    assert found["torch"]["stable"] and found["torch"]["unstable_symbols"] == []
    assert found["torch"]["unknown_shim_symbols"] == []
    assert found["torch"]["min_torch_version"] == "2.10.0"
    linked = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True)
    assert not re.search(r"libpython|libcudart|libtorch_python|libtorch_cuda", linked.stdout)


@built
def test_gpus_without_machine_code_have_ptx() -> None:
    """Of a low architecture: a GPU cannot run that of a later one."""
    commands = (ROOT / "build/cuda/build.ninja").read_text()
    assert set(re.findall(r"code=\[compute_(\d+)", commands)) == {"80"}
    assert set(re.findall(r"sm_(\d+)", commands)) == {"75", "80", "90", "120"}


@built
def test_the_stream_is_asked_for_weakly() -> None:
    listing = subprocess.run(["nm", "-D", CUDA], capture_output=True, text=True, check=True)
    assert re.search(r"\sw aoti_torch_get_current_cuda_stream", listing.stdout)
