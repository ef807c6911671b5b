# `make demo` and `make test` set up everything they need: Python 3.11 or newer, git and make are enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

# XLA's Cholesky on CPU is OpenBLAS's: its spinning threads would keep the cores from XLA's own.
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: demo test unit lint types floors notebooks clean

demo: $(VENV)/.ready
	$(BIN)/woodjax prune --out demo $(ARGS)

test: lint types floors unit

# A file in one process: what one of its tests compiled serves the others.
unit: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

floors: $(VENV)/.ready
	$(BIN)/lint-imports

# Every notebook at small sizes; writes nothing. `python notebooks/execute.py` writes outputs of full runs.
notebooks: $(VENV)/.ready
	$(BIN)/python notebooks/execute.py --small --check

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo .pytest_cache .ruff_cache .import_linter_cache
