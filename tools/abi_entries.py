"""Checks that both libraries load into this torch and register their kernels.

    python tools/abi_entries.py CPU_LIBRARY CUDA_LIBRARY

It imports nothing of this project, so torch loads the libraries of these paths and no others.
"""

import re
import sys
from pathlib import Path

import torch

CSRC = Path(__file__).resolve().parents[1] / "csrc"


def expected() -> dict[str, set[str]]:
    """Returns the devices of each operator: CPU, and CUDA where a source registers a kernel."""
    operators = re.findall(r'm\.def\(\s*"(\w+)\(', (CSRC / "library.cpp").read_text())
    cuda = "\n".join(path.read_text() for path in CSRC.glob("ops/*_cuda.cu"))
    with_kernel = set(re.findall(r'm\.impl\(\s*"(\w+)"', cuda))
    return {op: {"CPU", "CUDA"} if op in with_kernel else {"CPU"} for op in operators}


def main(cpu: str, cuda: str) -> int:
    """Loads the libraries; returns 0, or 1 after a line for each operator that is not as expected.

    Args:
        cpu: path of libcompact_cpu.so.
        cuda: path of libcompact_cuda.so.
    """
    torch.ops.load_library(cpu)
    torch.ops.load_library(cuda)
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    wrong = 0
    for op, devices in expected().items():
        found = {device for device in ("CPU", "CUDA") if has(f"compact::{op}", device)}
        if found != devices:
            wrong += 1
            print(f"{op}: expected kernels on {sorted(devices)}, got {sorted(found)}")
    if not wrong:
        print(f"torch {torch.__version__}, Python {sys.version.split()[0]}: both libraries load,",
              "every operator has its entries")  # fmt: skip
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
