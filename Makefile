# Each target makes its own virtual environment if there is none: nothing has to be installed first but Python 3.10 or later.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow clean

demo: $(INSTALLED)
	$(BIN)/python -m bone_ds.demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow"

# Longer checks, and those on a real model (fetched as for the demo).
test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# torch first and exactly: the plain name would bring a CUDA build of several gigabytes. For a GPU, install your torch before.
$(INSTALLED): setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) .demo build *.egg-info
