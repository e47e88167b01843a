# Everything runs in an environment of its own, made on first use: `make demo` and `make test` work in a fresh clone.
# Which package index is asked (and so whether torch comes with CUDA or for the CPU) is the user's pip configuration.

ifndef PYTHON
PYTHON := $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)
endif
VENV ?= .venv
DEMO_SCALE ?= quick
DEMO_ARGS ?=
PYTEST_WORKERS ?= 2
KILLS ?= 20
SCALE ?= full

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TEST_ENV := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
PYTEST := $(TEST_ENV) $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test quality format test-resume test-distributed deepspeed test-leaks test-notebooks test-kill test-architectures tables docs evidence bench build release-check chromium clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  Variables: PYTHON=$(PYTHON) VENV=$(VENV) PYTEST_WORKERS=$(PYTEST_WORKERS) DEMO_ARGS='--domain python'"

# torch first and alone, so that its pinned release is the one that everything else is resolved against.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

install: $(STAMP) ## make the environment

# The full scale keeps what is finished, so that it can go on after a kill; a quick demo leaves its folder alone.
demo: $(STAMP) ## train and report a small example into demo_output/ (DEMO_SCALE=full: an hour, into demo_output/full)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/hf-pretrain-ext demo --scale $(DEMO_SCALE) --output demo_output$(if $(filter full,$(DEMO_SCALE)),/full) $(DEMO_ARGS)

test: quality ## format, lint and type checks, then every test not marked slow
	$(PYTEST) -m "not slow" -n $(PYTEST_WORKERS) --dist loadfile

quality: $(STAMP) ## format, lint and type checks
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p hf_pretrain_ext

format: $(STAMP) ## rewrite the sources the way `quality` wants them
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

test-resume: $(STAMP) ## the full product of exact-resume cases
	$(PYTEST) -m resume -n $(PYTEST_WORKERS) --dist loadfile

test-distributed: $(STAMP) ## every test that starts several ranks, one after another (ZeRO's after make deepspeed)
	$(PYTEST) -m distributed

deepspeed: $(STAMP) ## install DeepSpeed, for the tests of ZeRO-2 and ZeRO-3
	DS_ACCELERATOR=cpu DS_BUILD_OPS=0 $(BIN)/python -m pip install -c constraints.txt -e '.[deepspeed]'

test-leaks: $(STAMP) ## memory and open files over 2,000 steps
	$(PYTEST) -s -m leaks

test-architectures: $(STAMP) ## every plug-in on every family; writes docs/architectures.md
	rm -f .architectures.jsonl
	ARCHITECTURES=$(CURDIR)/.architectures.jsonl $(PYTEST) tests/test_architectures.py -k reloads
	$(BIN)/python tests/architectures.py .architectures.jsonl docs/architectures.md
	rm -f .architectures.jsonl

test-notebooks: $(STAMP) ## every notebook, as it is and as Colab runs it
	$(PYTEST) tests/test_notebooks.py -n $(PYTEST_WORKERS)

test-kill: $(STAMP) ## kill runs at random moments: KILLS=20 for each setting of tests/kill_worker.py
	KILLS=$(KILLS) $(PYTEST) -s -m kill

tables: $(STAMP) ## write the README's table of plug-ins and the cards' section API anew
	$(BIN)/python docs/_generated.py

docs: $(STAMP) ## the site, into site/, with warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

evidence: $(STAMP) ## what the methods do to what a model knows; goes on after a kill (SCALE=small: a quarter of an hour)
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/continual.py run --scale $(SCALE) --output evidence
	$(BIN)/python benchmarks/continual.py report --scale $(SCALE) --output evidence

bench: $(STAMP) ## what each plug-in costs per step
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks/overhead.py

build: $(STAMP) ## sdist and wheel into dist/
	rm -rf dist
	$(BIN)/python -m build

release-check: build ## build, twine, the wheel in new environments with the oldest and newest releases (half an hour)
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python tests/release_check.py dist build/release-check

chromium: ## install the browser that the report's tests look with (Debian, as root)
	apt-get install -y --no-install-recommends chromium

clean: ## remove what the other targets made, except the environment
	rm -rf build dist site demo_output .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find . -path ./.git -prune -o -path './$(VENV)' -prune -o -type d -name __pycache__ -exec rm -rf {} +
