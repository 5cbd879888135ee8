# make demo      set up, then run the main job on the model that ships with the package
# make test      set up, then lint, type-check and run every test that a CPU can run
# make test-gpu  set up, then compare the kernels with the contract on an NVIDIA GPU
# make bench     set up, then measure: the GPU's table where there is one, else the CPU's
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-gpu bench lint clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/halfbyte demo

test: $(READY) lint
	$(BIN)/python -m pytest -n 2 --dist worksteal
	$(BIN)/python -O -m pytest -n 2 --dist worksteal -q -m "not slow" --ignore tests/kernels --ignore tests/numerics

# Nearly all of it is compilation, so eight processes share it; without pytest-xdist leave -n and --dist out.
# Where packages are installed already: PYTHONPATH=src python3 -m pytest -q -n 8 -m gpu tests, python3 benchmarks.
test-gpu: $(READY)
	$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make test-gpu needs an NVIDIA GPU")'
	$(BIN)/python -m pytest -q -n 8 --dist worksteal -m gpu tests/kernels tests/calib tests/checkpoint tests/export tests/test_tensor_gpu.py

bench: $(READY)
	$(BIN)/python benchmarks --json

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Tested versions come from one file; torch goes first and by exact pin, so that pip takes a CPU build where one is offered.
$(READY): requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "halfbyte needs Python 3.11 or newer; run make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) demo-output .pytest_cache .mypy_cache .ruff_cache
