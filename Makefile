# Everything runs in a virtual environment of the project's own, .venv; `make setup` makes it, the other targets call it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# One process per core, one thread per process: many small tests on small tensors.
UNIT := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --durations 40 \
	-m "not ranks and not gpu and not cluster" --ignore tests/cuda_path --ignore tests/sm90

# What Python has compiled is kept, whatever the environment says: the tests start some hundred processes.
test-unit test-processes test-alone test-cuda-path test-gpu: export PYTHONDONTWRITEBYTECODE :=

.PHONY: help setup demo test test-unit test-processes test-alone test-ranks test-cluster test-cuda-path test-sm90 test-gpu wheels-gpu test-mutation lint format

help:
	@echo "make setup         install the pinned requirements and this project into $(VENV)"
	@echo "make demo          from text to a trained and evaluated model, on two cores in minutes"
	@echo "make test          unit tests, CUDA's path on a CPU, several ranks, then (as root) several hosts"
	@echo "make test-unit     unit tests alone"
	@echo "make test-ranks    tests that start several ranks"
	@echo "make test-cluster  jobs on several hosts, made of network namespaces: installs Debian packages, needs root"
	@echo "make test-cuda-path  the path that CUDA takes, compiled and run on a CPU"
	@echo "make test-sm90     every layer compiled for an H100, without one: downloads 3 GB, needs Python 3.12 or later"
	@echo "make test-gpu      what needs a GPU"
	@echo "make wheels-gpu    packages for tests/gpu/bare.sh, which tests a GPU of a machine without network"
	@echo "make test-mutation  change the program in many places, one at a time: do its tests notice? hours"
	@echo "make lint          linter and formatter, changing nothing"
	@echo "make format        format the code"

setup: $(STAMP)

$(STAMP): requirements.txt requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("needs Python 3.11 or later: make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements-dev.txt
	$(BIN)/python -m pip install --no-deps --editable .
	@touch $@

demo: setup
	$(BIN)/bst demo

test: test-unit test-cuda-path
	@if test "$$(id -u)" = 0; then $(MAKE) test-processes test-alone; \
	else $(MAKE) test-ranks && echo "left out: make test-cluster, which needs root"; fi

test-unit: setup
	$(UNIT)

# Tests that start several processes, which often wait: three at a time, on two cores too. Those on several hosts take
# turns, for there is one network of hosts; those that measure run when nothing else does. What takes longest starts first
# (tests/conftest.py).
BESIDE := -n 3 --dist loadfile --no-loadscope-reorder
KINDS  := ranks or cluster
# Other files are not even imported, which would take each of these processes longer than many of its tests.
MARKED  = $$(grep -rlE "mark\.($(1))" tests --include "test_*.py" | sort)

test-processes: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(BESIDE) --durations 20 -m "($(KINDS)) and not (gpu or alone)" \
		$(call MARKED,ranks|cluster)

test-alone: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "alone and not gpu" $(call MARKED,alone)

test-ranks:
	$(MAKE) test-processes test-alone KINDS=ranks

test-cluster:
	$(MAKE) test-processes KINDS=cluster

# The path that CUDA takes, on a CPU: apart from the unit tests, for it compiles for minutes.
test-cuda-path: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical tests/cuda_path

# Layers as a GPU would get them: Inductor's programs and sm_90 machine code. It needs torch as it is built for CUDA (no
# GPU, no driver), which the package index has for Python 3.12 and later where the CPU build serves 3.11.
PYTHONS_SM90 := python3 python3.14 python3.13 python3.12 $(wildcard $(HOME)/.pyenv/versions/3.1[2-4].*/bin/python3)
PYTHON_SM90 ?= $(shell for one in $(PYTHONS_SM90); do $$one -c 'import sys; sys.exit(sys.version_info < (3, 12))' \
	2>/dev/null && echo $$one && break; done)
SM90 := .venv-sm90

test-sm90: $(SM90)/.installed
	OMP_NUM_THREADS=1 $(SM90)/bin/python -m pytest -n logical --noconftest -p no:cacheprovider tests/sm90

$(SM90)/.installed: tests/sm90/requirements.txt
	@test -n "$(PYTHON_SM90)" || { echo "needs Python 3.12 or later, and found none: make test-sm90 PYTHON_SM90=..."; exit 1; }
	test -x $(SM90)/bin/python || $(PYTHON_SM90) -m venv $(SM90)
	$(SM90)/bin/python -m pip install -r tests/sm90/requirements.txt
	@$(SM90)/bin/python -c 'import sys, torch; sys.exit(None if torch.version.cuda else f"torch {torch.__version__} is not built with CUDA: no layer can be compiled for sm_90")'
	@touch $@

# Mostly it compiles, so several processes share the GPU. On a machine without one, BST_REHEARSE_GPU=1 runs what a CPU can.
GPU_ENVIRONMENT := CUBLAS_WORKSPACE_CONFIG=:4096:8 TORCHINDUCTOR_COMPILE_THREADS=2 OMP_NUM_THREADS=1

test-gpu: setup
	$(GPU_ENVIRONMENT) $(BIN)/python -m pytest -n logical --maxprocesses 8 -m gpu tests/gpu

# For tests/gpu/bare.sh, on a machine without network. Compiled packages are fetched where its Python is another one.
PYTHONS_GPU ?= 3.12
WHEELS_GPU := build/wheels-gpu

wheels-gpu: setup
	rm -rf $(WHEELS_GPU)
	$(BIN)/python tests/gpu/wheels.py $(WHEELS_GPU) $(PYTHONS_GPU)

# docs/testing.md says what it does, and what it found.
test-mutation: setup
	$(BIN)/python tests/mutation

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff format .
