# `make demo` and `make test` work on a fresh clone: they make .venv and install everything at pinned versions first.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt

# Compiling all that is installed takes longer than installing it; Python compiles what is imported, if it may keep it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test slow types planted clean

demo: .venv/installed
	$(BIN)/moestro compare smoe cartesian smoe+compete smoe+specialise cartesian+compete+specialise \
		--out runs/demo

test: .venv/installed-dev
	$(BIN)/ruff format --check --quiet
	$(BIN)/ruff check --quiet
	$(BIN)/lint-imports >/dev/null
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow"

slow: .venv/installed-dev
	$(BIN)/python -m pytest -m slow

types: .venv/installed-dev
	$(BIN)/pyright

planted: .venv/installed-dev
	$(BIN)/python scripts/planted_bugs.py

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv runs
