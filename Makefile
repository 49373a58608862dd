# Meshloom: `make quickstart` shows it working, `make test` checks it. Both set themselves up first; `make help` lists the rest.
#
# All Python lives in $(VENV), made from the first Python >= 3.12 that really runs (PYTHON=... overrides). An install is repeated only when
# pyproject.toml or constraints.txt changed.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV ?= .venv
PY := $(VENV)/bin/python
PYTHON ?=
# Processes of `make test`; each compiles, so more than the cores only makes it slower.
JOBS ?= 2
ARGS ?=

.PHONY: help setup quickstart test test-slow lint format bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

quickstart: $(VENV)/.installed-run ## answer with a real model through a server, train one, serve that (under 4 minutes on 2 cores)
	@$(PY) -m meshloom.quickstart $(ARGS)

setup: $(VENV)/.installed-dev ## everything for development, into .venv
	@echo "$(VENV) is ready"

test: $(VENV)/.installed-dev ## all tests but the slow ones; ARGS="-k name" is handed to pytest
	$(PY) -m pytest -n $(JOBS) --dist loadfile -m "not slow" -q $(ARGS)

test-slow: $(VENV)/.installed-dev ## the long checks
	$(PY) -m pytest -m slow -q $(ARGS)

lint: $(VENV)/.installed-dev ## ruff check, ruff format --check, mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/.installed-dev ## put the source into the one format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(VENV)/.installed-run ## output tokens/s of 32 requests, 128 tokens in and 64 out, on this machine
	$(PY) -m meshloom.cli bench serve --offline --model smollm2 --requests 32 --input-len 128 --output-len 64 --json $(ARGS)

clean: ## remove .venv, build products and caches (not runs/)
	rm -rf $(VENV) build dist meshloom.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made:
	@.ci/make-venv "$(VENV)" $(PYTHON)
	@touch $@

# The quickstart asks its questions with the openai client, which is all it needs beyond the package itself.
$(VENV)/.installed-run: $(VENV)/.made pyproject.toml constraints.txt
	@echo "installing Meshloom into $(VENV) (once; minutes on a slow line)"
	@$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e . openai
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.made pyproject.toml constraints.txt
	@echo "installing Meshloom and its development tools into $(VENV) (once; minutes on a slow line)"
	@$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@mkdir -p $(VENV)/types && ln -sfn ../.. $(VENV)/types/meshloom
	@touch $@ $(VENV)/.installed-run
