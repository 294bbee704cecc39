# Set up and run everything; `make help` lists the targets.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory

# The first of these that is Python 3.11 or later; `make PYTHON=...` chooses another.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Files of tests run side by side, each worker with servers of its own. One more than two cores: each waits now and then.
AT_ONCE := -n 3 --dist loadfile

# Relays, commands and consumers are started by the hundred, and without it each compiles every library anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo setup test matrix bench semantics quick check format lock clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 10

demo: ## Watch orders go from PostgreSQL to Kafka although the relay is killed; real servers, started for you
	@began=$$(date +%s%N); $(MAKE) --silent setup; \
	printf 'set up in %s s\n' "$$(( ($$(date +%s%N) - began) / 1000000000 ))"; \
	$(BIN)/outbox-relay demo; \
	printf 'make demo took %s s in all\n' "$$(( ($$(date +%s%N) - began) / 1000000000 ))"

setup: $(INSTALLED) ## Make the virtual environment

# The lock file has a hash for each package, so what is installed is what was tested.
$(INSTALLED): requirements.lock pyproject.toml
	@[ -n "$(PYTHON)" ] || { echo "Python 3.11 or later is needed; if it has another name: make PYTHON=/path/to/python"; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version) (only when requirements.lock or pyproject.toml has changed)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --no-build-isolation -e .
	@touch $@

test: setup ## Run all tests on real PostgreSQL and Apache Kafka
	$(BIN)/pytest $(AT_ONCE)

matrix: setup ## The tests on each version of PostgreSQL, Kafka and Python that is claimed; about an hour
	$(BIN)/python -m tests.matrix

bench: setup ## Measure it beside what else could be taken; an hour, or three minutes with QUICK=1; RESUME=1 goes on
	$(BIN)/python -m bench run $(if $(QUICK),--quick) $(if $(RESUME),--resume)

semantics: setup ## Count what is lost and repeated, by delivery mode and fault; five minutes; writes docs/semantics.md
	$(BIN)/python -m tests.semantics --document

quick: setup ## Lint, format, types, import contract, unit tests; for every commit
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest tests/unit

check: quick ## quick, then all other tests; what CI runs
	$(BIN)/pytest --ignore=tests/unit $(AT_ONCE)

format: setup ## Format the code and mend what ruff can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# --universal: one file for every supported Python and platform.
lock: ## Choose the newest versions that pyproject.toml allows and write requirements.lock
	@$(PYTHON) -m venv .cache/lock
	@.cache/lock/bin/python -m pip install --quiet --disable-pip-version-check uv
	@.cache/lock/bin/uv pip compile --quiet --upgrade pyproject.toml --extra demo --extra compression --extra redis \
		--extra faststream --group dev --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header -o requirements.lock

clean: ## Remove what was built here; downloads stay in the cache
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis dist build reports
