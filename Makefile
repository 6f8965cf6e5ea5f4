# `make demo` and `make test` need nothing but a clone, Python >= 3.10 and make.
# Every path is relative and every tool a module of the environment's Python: the clone's own path may have spaces.
PYTHON ?= python3
EXTRAS ?= dev
VENV := .venv
RUN := $(VENV)/bin/python -m
PIP := pip install --quiet --disable-pip-version-check
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo demo-sft test test-lowest lint docs bench clean

help:  ## show the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "poetx needs Python >= 3.10; $$("$(PYTHON)" --version) is $$(command -v "$(PYTHON)"). Try: make install PYTHON=python3.11" >&2; exit 1; }
	test -x $(VENV)/bin/python || "$(PYTHON)" -m venv $(VENV)
	$(RUN) $(PIP) -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

install: $(STAMP)  ## make .venv with the project and its development extras

demo: install  ## pre-train a small Llama on the built-in corpus and show what it learnt
	$(RUN) poetx train

BASE := runs/demo-single-step/export
TINY := data.seq_len=128 train.steps=150 train.batch_size=8 train.micro_batch_size=8 train.eval_every=50 train.eval_windows=16 \
  model.gradient_checkpointing=false poet.block_size=64 optimizer.lr=1e-3 optimizer.poet_lr=2e-3 poet.merge_every=50
demo-sft: install  ## fine-tune what `make demo` trained on instructions made of docstrings, and compare it with the untouched model
	test -d $(BASE) || $(RUN) poetx train run_dir=runs/demo-single-step
	$(RUN) benchmarks.docstrings runs/docstrings.jsonl
	$(RUN) poetx train sft model.pretrained=$(BASE) data.train=runs/docstrings.jsonl run_dir=runs/demo-sft $(TINY) --overwrite

test: install  ## run the tests
	$(RUN) pytest -n auto --maxprocesses 8 --dist worksteal

test-lowest:  ## run the tests with the oldest versions that are supported (downloads gigabytes)
	test -x $(VENV)-lowest/bin/python || "$(PYTHON)" -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m $(PIP) -c constraints-lowest.txt -e '.[dev]'
	$(VENV)-lowest/bin/python -m pytest

lint: install  ## ruff and pyright
	$(RUN) ruff check . && $(RUN) ruff format --check . && $(RUN) pyright

docs: install  ## build the documentation as a site, build/site/index.html
	$(RUN) $(PIP) -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --quiet

bench: install  ## time one layer against nn.Linear on this machine
	$(RUN) poetx bench layer

clean:  ## remove the environment and the caches
	rm -rf $(VENV) $(VENV)-lowest .pytest_cache .ruff_cache build src/*.egg-info
