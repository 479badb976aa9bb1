# Each target makes its own virtual environment if there is none: nothing has to be installed first but Python 3.11 or later.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow test-faults clean

demo: $(INSTALLED)
	$(BIN)/python -m bone_ds.demo

# Two workers, each with whole files: tests/conftest.py.
test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow" -n 2 --no-loadscope-reorder

# Longer checks on large models; those on the one that `make demo` fetches are skipped without it, and say so.
test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# Kills, damages and starves runs, for two hours at most; rows in .faults/. docs/faults.md.
test-faults: $(INSTALLED)
	$(BIN)/python -m tests.faults

# torch first and exactly, so that a build which is at hand is taken rather than the newest one with its gigabytes of CUDA.
# For a build of your own, make .venv and install it there before.
$(INSTALLED): setup.py pyproject.toml rwkv_adapters/wkv6/kernel.c
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) .demo .faults build *.egg-info
