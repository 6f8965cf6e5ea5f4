# `make demo` and `make test` need nothing but a clone, Python >= 3.10 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-lowest lint bench clean

help:  ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "poetx needs Python >= 3.10; $$($(PYTHON) --version) is $$(command -v $(PYTHON)). Try: make install PYTHON=python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

install: $(STAMP)  ## make .venv with the project and its development extras

demo: install  ## pre-train a small Llama on the built-in corpus and show what it learnt
	$(BIN)/poetx train

test: install  ## run the tests
	$(BIN)/python -m pytest -n auto --maxprocesses 8

test-lowest:  ## run the tests with the oldest versions that are supported (downloads gigabytes)
	test -x $(VENV)-lowest/bin/python || $(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt -e '.[dev]'
	$(VENV)-lowest/bin/python -m pytest

lint: install  ## ruff and pyright
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

bench: install  ## time one layer against nn.Linear on this machine
	$(BIN)/poetx bench layer

clean:  ## remove the environment and the caches
	rm -rf $(VENV) $(VENV)-lowest .pytest_cache .ruff_cache build src/*.egg-info
