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

# Then under python -O, which drops assert statements: whatever is refused must be refused without them, and the main job
# must run.
test: $(READY) lint
	$(BIN)/python -m pytest -n 2 --dist worksteal
	$(BIN)/python -O -m pytest -n 2 --dist worksteal -q -m "refusal and not slow" tests
	$(BIN)/python -O -m pytest -n 2 --dist worksteal -q -m "not slow" tests/test_cli.py tests/test_demo.py tests/checkpoint/test_convert.py

# Nearly all of it is compilation: about 20 minutes of one core, that as many processes share as there are cores. Tests
# that need the same kernels go to one process (loadgroup; tests/conftest.py says which), and the longest come first.
# Without pytest-xdist leave all that begins with -n, --dist and --no-loadscope out.
# Where packages are installed already: PYTHONPATH=src python3 -m pytest with these arguments, and python3 benchmarks.
test-gpu: $(READY)
	$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make test-gpu needs an NVIDIA GPU")'
	$(BIN)/python -m pytest -q -n auto --maxprocesses 16 --dist loadgroup --no-loadscope-reorder -m "gpu or multigpu" tests

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
