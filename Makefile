# Two commands do all the set-up: `make demo` and `make test`. Each makes the virtual environment first.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test format
demo: .venv/installed
	$(BIN)/staff experiment=demo

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/pytest

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,parallel]'
	touch $@
