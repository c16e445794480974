#!/usr/bin/env bash
# The operator libraries as they are built here, in another torch and another Python: they must load
# and compute without being rebuilt. tools/abi_check.sh [PYTHON]
#
# PYTHON has a torch >= 2.10, pytest and hypothesis. Without it the reference GPU environment is made in
# build/abi: Python 3.12 with torch 2.11 and CUDA 13.0 from PyPI (0.5 GB, and 2.2 GB of CUDA libraries
# that need no GPU to load). Needs `make cuda-checks` before it, for the CUDA library.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-build/abi/bin/python}
cpu=compact_ops/libcompact_cpu.so cuda=build/cuda/libcompact_cuda.so
for library in $cpu $cuda; do
  [ -f $library ] || { echo "abi_check: $library is missing: make cuda-checks" >&2; exit 1; }
done
if [ $# -eq 0 ] && [ ! -x $python ]; then
  python3.12 -m venv build/abi
  $python -m pip install -q --no-deps torch==2.11.0 \
    nvidia-{cublas,cuda-runtime,cuda-cupti,cuda-nvrtc}'==13.*' nvidia-cu{fft,solver,sparse}'==12.*' \
    nvidia-{curand,cufile,nvtx,nvjitlink} nvidia-{cudnn,cusparselt,nccl,nvshmem}-cu13
  $python -m pip install -q filelock typing-extensions sympy networkx jinja2 fsspec numpy pytest hypothesis
fi
"$python" - $cpu $cuda csrc/library.cpp <<'PYTHON'
import re, sys, torch
cpu, cuda, schemas = sys.argv[1:]
torch.ops.load_library(cpu)
torch.ops.load_library(cuda)
operators = re.findall(r'm\.def\(\s*"(\w+)\(', open(schemas).read())
for op in operators:
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key("compact::" + op, key), (op, key)
print(f"torch {torch.__version__}, Python {sys.version.split()[0]}: both libraries load,",
      f"{len(operators)} operators have their CPU and CUDA entry")
PYTHON
# Not torch.compile: what it traces differs from torch to torch, and no library of ours takes part.
"$python" -m pytest -p no:cacheprovider -m "not slow" -k "not compile" tests/ops
