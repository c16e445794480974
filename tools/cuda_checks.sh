#!/usr/bin/env bash
# The rungs that keep the CUDA kernels honest without a GPU: tools/cuda_checks.sh [--write]
# --write renews docs/results/cuda_resources.md and docs/results/mutants.md.
set -euo pipefail
cd "$(dirname "$0")/.."
PY=$(realpath -s "${PY:-.venv/bin/python}")
export PATH="$(dirname "$PY"):$PATH"
step() { echo; echo "== cuda $(date +%H:%M:%S) $*"; }

step "1 nvcc: every kernel for every architecture, warnings are errors"
command -v nvcc > /dev/null || . tools/install_nvcc.sh
rm -rf build/cuda
cmake -S . -B build/cuda -G Ninja "-DPython_EXECUTABLE=$PY" -DCOMPACT_CUDA=ON > /dev/null
cmake --build build/cuda -j 2 -t compact_cuda > build/cuda/log.txt 2>&1 || { tail -n 40 build/cuda/log.txt; exit 1; }
"$PY" tools/cuda_resources.py build/cuda/log.txt "$@"

step "2 the library loads into a torch without CUDA; every operator has its entry; stable symbols only"
"$PY" -m pytest tests/simt/test_cuda_library.py

step "3 host harness: fibers, then real threads under the sanitizers"
source_files="tests/simt/simt_kernels.cpp tests/simt/simt_host.cpp"
build() { g++ -std=c++20 -g -Wall -Wextra -Werror -Icsrc -Itests/simt $source_files -pthread "$@"; }
mkdir -p build/harness
build -O2 -o build/harness/fibers && build/harness/fibers fibers 1 | tail -n 1
build -O1 -fsanitize=thread -o build/harness/tsan && build/harness/tsan threads 1 | tail -n 1
build -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -o build/harness/asan
build/harness/asan threads 1 | tail -n 1

step "4 mutants: every planted fault must be found"
"$PY" tests/simt/mutants.py "$@" | tail -n 1

step "5 the same kernels as operators of the CPU, under pytest and hypothesis"
"$PY" -m pytest -m "not cuda" tests/simt/test_device_operators.py
echo "rung 6 needs a GPU: tools/gpu.sh. No figure of a GPU exists yet."
