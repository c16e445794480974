#!/usr/bin/env bash
# Checks that the operator libraries built here load and compute in another torch and another Python
# without a rebuild. tools/abi_check.sh [PYTHON]
#
# PYTHON has a torch >= 2.10, pytest and hypothesis. Without PYTHON, the script creates the reference GPU
# environment in build/abi: Python 3.12 with torch 2.11 and CUDA 13.0 from PyPI (0.5 GB, and 2.2 GB of
# CUDA libraries, which load without a GPU). Run `make cuda-checks` first, for the CUDA library.
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
"$python" tools/abi_entries.py $cpu $cuda
# Without torch.compile: its traces differ between torch versions and do not involve our libraries.
"$python" -m pytest -p no:cacheprovider -m "not slow" -k "not compile" tests/ops
