# `make demo` and `make test` set up everything they need: Python 3.11 or newer, git and make are enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

# XLA's Cholesky on CPU is OpenBLAS's: its spinning threads would keep the cores from XLA's own.
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: demo test unit lint types floors docs release notebooks regression clean

demo: $(VENV)/.ready
	$(BIN)/woodjax prune --out demo $(ARGS)

test: lint types floors docs unit

# A file in one process: what one of its tests compiled serves the others.
unit: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: $(VENV)/.ready
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	PATH="$(abspath $(BIN)):$$PATH" basedpyright --verifytypes woodjax --ignoreexternal > .types || { tail -40 .types; exit 1; }

floors: $(VENV)/.ready
	$(BIN)/lint-imports

# Into site/; look at it by `python -m http.server --directory site`. The switch silences a notice of the theme's.
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What would be released: builds, checks and uses the wheel and the sdist.
release: $(VENV)/.ready
	.ci/release $(BIN)/python

# Every notebook at small sizes; writes nothing. `python notebooks/execute.py` writes outputs of full runs.
notebooks: $(VENV)/.ready
	$(BIN)/python notebooks/execute.py --small --check

# Accuracies at small size against those of benchmarks/expected.json.
regression: $(VENV)/.ready
	$(BIN)/python benchmarks check

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo dist site .types .pytest_cache .ruff_cache .import_linter_cache
