"""The CUDA library without a GPU: it loads, has every entry, needs stable symbols only."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "build/cuda/libcompact_cuda.so"
CPU = ROOT / "compact_ops/libcompact_cpu.so"

needs_cuda_build = pytest.mark.skipif(
    not CUDA.exists(), reason="no CUDA build (tools/cuda_checks.sh makes one)"
)


def operators() -> list[str]:
    """Names of all operators in csrc/library.cpp."""
    text = (ROOT / "csrc/library.cpp").read_text()
    return re.findall(r'm\.def\(\s*"(\w+)\(', text)


@needs_cuda_build
def test_it_loads_into_a_torch_without_cuda_and_registers_every_operator() -> None:
    code = (
        "import torch\n"
        f"torch.ops.load_library({str(CPU)!r}); torch.ops.load_library({str(CUDA)!r})\n"
        f"for op in {operators()!r}:\n"
        "    ok = torch._C._dispatch_has_kernel_for_dispatch_key('compact::' + op, 'CUDA')\n"
        "    assert ok, op\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("library", [CPU, pytest.param(CUDA, marks=needs_cuda_build)])
def test_it_needs_the_stable_interface_of_torch_only(library: Path) -> None:
    listing = subprocess.run(
        ["nm", "-DC", "--undefined-only", library], capture_output=True, text=True, check=True
    )
    symbols = [line.split(maxsplit=1)[1] for line in listing.stdout.splitlines() if " " in line]
    unstable = [s for s in symbols if re.search(r"\b(at|c10|caffe2|Py\w*|_Py\w*)(::|$)|torch::", s)]
    assert unstable == []
    linked = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True)
    assert "libpython" not in linked.stdout
    assert "libcudart" not in linked.stdout
    assert "libtorch_python" not in linked.stdout


@needs_cuda_build
def test_the_stream_is_asked_for_weakly() -> None:
    listing = subprocess.run(["nm", "-D", CUDA], capture_output=True, text=True, check=True)
    assert re.search(r"\sw aoti_torch_get_current_cuda_stream", listing.stdout)
