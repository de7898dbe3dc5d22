# Everything a newcomer types. Each target sets up what it needs; Python 3.11 or later is all it takes.
#
#   make distill         distill CHGNet into a small model of silicon, and run MD with it
#   make test            run the tests
#   make help            list all targets

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Where the main job writes; `make distill OUT=runs/mine` puts it elsewhere. A run that was
# interrupted resumes in the same place.
OUT ?= runs/silicon
OUT_SHORT ?= runs/silicon-short

# Sources of the native core: a change compiles it anew.
NATIVE := CMakeLists.txt $(wildcard core/*.cpp core/include/* core/lammps/* core/src/*)

# More for pytest, as in `make test PYTEST_ARGS="-k layers"`.
PYTEST_ARGS ?=

# Tests are many small problems: one thread each, one process per core.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: help setup distill distill-short test lint format types docs check clean

help:
	@echo "make setup          make the virtual environment $(VENV) (all others do it by themselves)"
	@echo "make distill        distill CHGNet for silicon: structures, labels, training, report, MD -> $(OUT)"
	@echo "make distill-short  the same in a few minutes, to see that it works -> $(OUT_SHORT)"
	@echo "make test           run the tests"
	@echo "make lint           ruff check and ruff format --check"
	@echo "make format         let ruff mend what it can"
	@echo "make types          mypy"
	@echo "make docs           build the documentation into site/, warnings are errors"
	@echo "make check          lint, types, test, docs"
	@echo "make clean          remove what was built (not $(VENV), not runs)"

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "potstill needs Python 3.11 or later, and $(PYTHON) is $$($(PYTHON) --version 2>&1): try make PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up $(VENV): about two minutes and 2 GB the first time."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

distill: $(INSTALLED)
	$(BIN)/potstill distill --out $(OUT)

distill-short: $(INSTALLED)
	$(BIN)/potstill distill --budget 3min --out $(OUT_SHORT)

test: $(INSTALLED)
	$(ONE_THREAD) $(BIN)/python -m pytest -n auto $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(INSTALLED)
	$(BIN)/mypy

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: lint types test docs

clean:
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
