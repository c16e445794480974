#!/usr/bin/env bash
# Check 6, one command for a machine with a GPU: builds (or takes the libraries from WHEEL=FILE), tests,
# sanitizes and measures. All output goes to the folder gpu-results/; its summary.txt has the result of
# each step.
#
# PY is a Python whose torch has CUDA, with the packages of this project's dev extra (reference: Python
# 3.12, torch 2.11, CUDA 13.0). nvcc and compute-sanitizer are installed from PyPI if the machine has none.
set -uo pipefail
cd "$(dirname "$0")/.."
stop() { echo "make gpu: $*" >&2; exit 1; }
PY=$(realpath -s "${PY:-.venv/bin/python}")
[ -x "$PY" ] || stop "no Python at $PY; name one whose torch has CUDA: make gpu PY=..."
[ -z "${WHEEL:-}" ] || [ -f "$WHEEL" ] || stop "WHEEL=$WHEEL: no such file"
[[ $(nvidia-smi -L 2> /dev/null) == "GPU "* ]] \
  || stop "this machine has no GPU (nvidia-smi names none)"
"$PY" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' \
  || stop "the torch of $PY sees no GPU; it must be a build with CUDA"
export PATH="$(dirname "$PY"):$PATH"

out=gpu-results failed=0
rm -rf $out
mkdir -p $out
step() { # step NAME COMMAND...: runs the command, saves its output, continues after a failure
  local name=$1
  shift
  echo "== $name"
  "$@" > "$out/$name.txt" 2>&1
  local code=$?
  tail -n 3 "$out/$name.txt"
  echo "$name: exit $code" >> $out/summary.txt
  [ $code -eq 0 ] || failed=1
}
install_sanitizer() {
  "$PY" -m pip install -q --no-deps --target build/sanitizer 'nvidia-cuda-sanitizer-api==13.0.*'
}
build() ( # a subshell: what it sources may exit
  if [ -n "${WHEEL:-}" ]; then
    "$PY" - "$WHEEL" <<< 'import sys, zipfile
wheel = zipfile.ZipFile(sys.argv[1])
wheel.extractall(".", [name for name in wheel.namelist() if name.endswith(".so")])'
  else
    . tools/install_nvcc.sh
    COMPACT_CUDA=ON "$PY" -m pip install --no-build-isolation --no-deps -e .
  fi
)
bench() { "$PY" -m benchmarks.run "$@" --device cuda --dtype bfloat16 --results $out; }

step device nvidia-smi
step torch "$PY" -m torch.utils.collect_env
step build build
step pytest "$PY" -m pytest -m cuda tests
command -v compute-sanitizer > /dev/null || {
  step sanitizer install_sanitizer
  export PATH="$PWD/build/sanitizer/nvidia/cu13/bin:$PATH"
}
for tool in memcheck racecheck synccheck; do # only our kernels, not those of torch
  step "$tool" compute-sanitizer --tool "$tool" --kernel-name kns=compact --error-exitcode 1 \
    "$PY" -m pytest -x -m cuda tests/simt/test_device_operators.py
done
step bounds "$PY" tools/gpu_bounds.py
step head bench head --shape M=8192,H=2048,V=151936,head=frozen,hidden=random
step ops bench ops --shape op=row_stats_,R=4096,V=151936 --shape op=filtered_matmul,V=151936,H=2048
step kl bench kl --shape K=4,T=256,H=2048,V=151936
step attention bench attention
echo
cat $out/summary.txt
exit $failed
