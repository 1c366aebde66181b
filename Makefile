# Every target does its own set-up. `make help` lists them.

PYTHON ?= python3
PYTEST_WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/set-up
CONSTRAINTS := constraints/cpu.txt
TEST_PARTS := lint types unit functional

# Engines whose own servers are tested, each in an environment of its own: their pins conflict.
ENGINES := sglang vllm
ENGINE_STAMPS := $(ENGINES:%=.venv-%/set-up)

# Test processes share the cores by number, not by threads: models here are too small for two threads to help.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile --durations 10

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup train test test-all test-engines $(ENGINES:%=test-%) bench $(TEST_PARTS) format lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## the environment in .venv (nothing to do where it is up to date)

$(STAMP): setup.py $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
	  f"Python 3.11 or newer is wanted; $(PYTHON) is {v[0]}.{v[1]}. Say which: make setup PYTHON=/path/to/python3.11")'
	@echo "setup: $(VENV), the versions of $(CONSTRAINTS); some minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint $(CONSTRAINTS) setuptools
	$(BIN)/python -m pip install --constraint $(CONSTRAINTS) --no-build-isolation --editable '.[dev]'
	@touch $@

train: setup ## the arithmetic example: a tiny model learns by DAPO; results in runs/arithmetic
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python examples/arithmetic/run.py

test: setup ## lint, types, unit and functional tests, and the seconds that each took
	@failed=; table=; \
	for part in $(TEST_PARTS); do \
	  start=$$(date +%s); \
	  $(MAKE) --no-print-directory $$part && result=ok || { result=FAILED; failed="$$failed $$part"; }; \
	  table="$$table$$(printf '%-12s %6d s  %s' $$part $$(($$(date +%s) - start)) $$result)\n"; \
	done; \
	printf "\n$$table"; \
	test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

lint: setup ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## pyright
	$(BIN)/pyright

unit: setup ## tests/unit
	$(PYTEST) -m 'not slow' tests/unit

functional: setup ## tests/functional
	$(PYTEST) -m 'not slow' tests/functional

test-all: lint types ## everything, also the tests marked slow: several seeds, long matrices, kill sweeps
	$(PYTEST) tests

test-engines: $(ENGINES:%=test-%) ## SGLang's and vLLM's own servers on this CPU, in environments of their own

test-sglang test-vllm: test-%: .venv-%/set-up
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest --durations 10 tests/engines

# flock: the package's own build writes here, and two environments may be made side by side.
# --no-deps: engines ask for CUDA builds that a CPU neither needs nor can load; the lists are all that they need there.
$(ENGINE_STAMPS): .venv-%/set-up: setup.py constraints/%-cpu.txt
	@echo "setup: .venv-$*, the versions of constraints/$*-cpu.txt; some minutes the first time"
	@test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --no-deps --requirement constraints/$*-cpu.txt
	flock setup.py .venv-$*/bin/python -m pip install --no-deps --no-build-isolation --editable .
	@touch $@

bench: setup ## every program in benchmarks/; the numbers also as JSON in runs/benchmarks
	@mkdir -p runs/benchmarks
	@set -e; for program in benchmarks/*.py; do \
	  $(BIN)/python $$program --json runs/benchmarks/$$(basename $$program .py).json; \
	done

format: setup ## ruff: format, and mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: setup ## constraints/cpu.txt from what is installed in .venv
	@{ sed -n '/^#/p' $(CONSTRAINTS); $(BIN)/python -m pip freeze --exclude megatron_dapo --all --exclude pip \
	  | sed 's/+cpu$$//'; } > $(CONSTRAINTS).new && mv $(CONSTRAINTS).new $(CONSTRAINTS)

clean: ## remove .venv, caches and builds; runs/ stays
	rm -rf $(VENV) $(ENGINES:%=.venv-%) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
