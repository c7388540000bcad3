# Two commands do everything on a fresh machine: `make demo` and `make test`. Each makes the environment it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Tests are many and small: a process per core, each with one thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

.PHONY: help setup demo test check unit test-all fmt golden docs screenshot bench clean

help:
	@echo "make demo   the main job on a real small model and real text (about 10 minutes)"
	@echo "make test   linters, types, import rules and all tests"
	@echo "make bench  slow measurements; rewrites the tables of BENCHMARKS.md"
	@echo "make fmt | docs | screenshot | golden | test-all | clean"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

setup: $(INSTALLED)

# The demo's GGUF file is run in llama.cpp where its package can be had.
demo: $(INSTALLED)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[llama-cpp]" \
	  || echo "no llama.cpp package for this machine: the GGUF file will be written and not be run"
	$(BIN)/secateur demo

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/lint-imports --no-cache --no-logo
	$(BIN)/python docs/generate.py --check

unit: $(INSTALLED)
	$(PYTEST)

test: check unit

test-all: check
	$(PYTEST) -m ""

fmt: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: $(INSTALLED)
	$(BIN)/python tests/golden/make.py

docs: $(INSTALLED)
	$(BIN)/python docs/generate.py

screenshot: $(INSTALLED)
	$(BIN)/python docs/screenshot.py

bench: $(INSTALLED)
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
