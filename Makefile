# Each target makes its own .venv from the constraints if there is none.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test quick bench lint docs clean

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/.ready
	$(BIN)/graftwork demo --out runs/demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadgroup

quick: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow and not distributed"

bench: $(VENV)/.ready
	$(BIN)/graftwork bench --json runs/benchmarks.json --write docs/benchmarks.md

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.ready
	$(BIN)/python -m graftwork.cli.main docs

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
