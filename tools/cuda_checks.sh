#!/usr/bin/env bash
# Five checks of the CUDA kernels that need no GPU: tools/cuda_checks.sh [--write]
# --write updates docs/results/cuda_resources.md and docs/results/mutants.md. No check is skipped: a check
# that cannot run fails.
set -euo pipefail
cd "$(dirname "$0")/.."
PY=$(realpath -s "${PY:-.venv/bin/python}")
JOBS=${JOBS:-2}
export JOBS PATH="$(dirname "$PY"):$PATH"
trap '[ $? -eq 0 ] || echo "cuda checks: FAILED at check $check" >&2' EXIT
step() { check=$1; echo "== cuda check $* ($SECONDS s)"; }
pytest() { "$PY" -m pytest -p no:cacheprovider "$@"; } # fails where it collects no test

step 1 "nvcc: every kernel for every architecture, warnings are errors, resources within the table"
. tools/install_nvcc.sh
rm -rf build/cuda # the log of a build from scratch holds every kernel
cmake -S . -B build/cuda -G Ninja "-DPython_EXECUTABLE=$PY" -DCOMPACT_CUDA=ON -DCOMPACT_WERROR=ON > /dev/null
cmake --build build/cuda -j "$JOBS" -t compact_cuda > build/cuda/log.txt 2>&1 \
  || { tail -n 40 build/cuda/log.txt; exit 1; }
"$PY" tools/cuda_resources.py build/cuda/log.txt "$@"

step 2 "the library loads into a torch without CUDA; every operator has its entry; stable symbols only"
pytest -m nvcc tests/simt/test_cuda_library.py

step 3 "host harness: fibers, then one thread a CUDA thread under TSan, ASan and UBSan"
mkdir -p build/harness
harness() { # harness NAME MODE FLAGS...: builds the kernels with FLAGS, runs them in MODE
  local name=$1 mode=$2 log=build/harness/$1.txt
  shift 2
  g++ -std=c++20 -g -Wall -Wextra -Werror -Icsrc -Itests/simt -pthread "$@" \
    tests/simt/simt_kernels.cpp tests/simt/simt_host.cpp -o "build/harness/$name" || return 1
  "build/harness/$name" "$mode" 1 > "$log" 2>&1 || { tail -n 40 "$log"; return 1; }
  echo "$name: $(tail -n 1 "$log")"
}
failed=0
harness fibers fibers -O2 & fibers=$!
harness tsan threads -O1 -fsanitize=thread & tsan=$!
wait $fibers || failed=1
harness asan+ubsan threads -O1 -fsanitize=address,undefined -fno-sanitize-recover=all || failed=1
wait $tsan || failed=1
[ $failed -eq 0 ] # false ends the script

step 4 "mutants: every planted fault is found"
"$PY" tests/simt/mutants.py "$@"

step 5 "the same kernels as operators of the CPU, under pytest and hypothesis"
pytest -m "not cuda" tests/simt/test_device_operators.py
echo "cuda checks: 5 of 5 checks passed in $SECONDS s. Check 6 needs a GPU: make gpu."
