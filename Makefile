# Everything runs in a virtual environment of the project's own, .venv; `make setup` makes it, the other targets call it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# One process a core, one thread a process: many small tests on small tensors.
UNIT := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical -m "not ranks and not gpu and not cluster" --ignore tests/cuda_path

.PHONY: help setup demo test test-unit test-ranks test-cluster test-cuda-path test-gpu lint format

help:
	@echo "make setup         install the pinned requirements and this project into $(VENV)"
	@echo "make demo          from text to a trained and evaluated model, on two cores in minutes"
	@echo "make test          unit tests, CUDA's path on a CPU, several ranks, then (as root) several hosts"
	@echo "make test-unit     unit tests alone"
	@echo "make test-cluster  jobs on several hosts, made of network namespaces: installs Debian packages, needs root"
	@echo "make test-cuda-path  the path that CUDA takes, compiled and run on a CPU"
	@echo "make test-gpu      what needs a GPU"
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

test: test-unit test-cuda-path test-ranks
	@if test "$$(id -u)" = 0; then $(MAKE) test-cluster; else echo "left out: make test-cluster, which needs root"; fi

test-unit: setup
	$(UNIT)

test-ranks: setup
	$(BIN)/python -m pytest -m "ranks and not gpu"

test-cluster: setup
	$(BIN)/python -m pytest -m cluster tests/cluster

# The path that CUDA takes, on a CPU: apart from the unit tests, for it compiles for minutes.
test-cuda-path: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical tests/cuda_path

# On a machine without a GPU, BST_REHEARSE_GPU=1 runs what a CPU can of it.
test-gpu: setup
	CUBLAS_WORKSPACE_CONFIG=:4096:8 $(BIN)/python -m pytest -m gpu tests/gpu

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: setup
	$(BIN)/ruff format .
