# `make demo` and `make test` work on a fresh clone: they make .venv and install everything at pinned versions first.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test slow lint clean

demo: .venv/installed
	$(BIN)/moestro compare dense smoe fine-grained --seeds 2 --out runs/demo

test: .venv/installed-dev lint
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow"

slow: .venv/installed-dev
	$(BIN)/python -m pytest -m slow

lint: .venv/installed-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports
	$(BIN)/pyright

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv runs
