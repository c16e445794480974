#!/usr/bin/env bash
# One command for a machine with a GPU: builds, tests, sanitizes and measures into gpu-results/.
# PY names a Python (>= 3.10) whose torch has CUDA (reference: torch 2.11, CUDA 13.0, Python 3.12).
set -uo pipefail
cd "$(dirname "$0")/.."
PY=$(realpath -s "${PY:-.venv/bin/python}")
out=gpu-results; mkdir -p $out; failed=0
step() { # step NAME COMMAND...: runs it, keeps its output, goes on after a failure
  local name=$1; shift
  echo "== $name"; "$@" > "$out/$name.txt" 2>&1
  local code=$?; echo "exit $code" >> "$out/$name.txt"; tail -n 3 "$out/$name.txt"
  [ $code -eq 0 ] || failed=1
}
step device nvidia-smi
step torch "$PY" -c 'import torch; assert torch.cuda.is_available(); print(torch.__version__, torch.cuda.get_device_name())'
step build env COMPACT_CMAKE_ARGS=-DCOMPACT_CUDA=ON "$PY" -m pip install --no-build-isolation --no-deps -e .
step pytest "$PY" -m pytest -m cuda tests/simt
for tool in memcheck racecheck synccheck; do
  step "$tool" compute-sanitizer --tool $tool --error-exitcode 1 "$PY" -m pytest -x -m cuda \
    tests/simt/test_device_operators.py -k "float32 or dtype0 or pairwise or small"
done
step benchmark "$PY" -m benchmarks.run head
exit $failed
