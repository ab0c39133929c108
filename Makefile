# `make` alone lists the targets. Everything installs into $(VENV); nothing outside the repository is touched.

# The interpreter that the environment is made from, and the one that `make test-gpu` runs on.
PYTHON ?= python3
VENV ?= .venv
# Test processes at a time; each computes on one thread.
WORKERS ?= 2
# More arguments for the command at hand: make demo ARGS="--help", make test ARGS="-k tap".
ARGS ?=

PY := $(VENV)/bin/python
PIP_INSTALL := $(PY) -m pip install --disable-pip-version-check --constraint constraints.txt

# Made when an installation has succeeded; older than either file below, it is done again.
BASE := $(VENV)/.installed-base
DEV := $(VENV)/.installed-dev
PINS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu test-long bench peers lint format clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(BASE) ## set up, then run the demo: log a training set, attribute, prove it (ARGS="--help" for its options)
	$(VENV)/bin/loghook demo $(ARGS)

test: lint ## set up, then check format, lint, types, and run the tests (WORKERS=2, ARGS="-k name")
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-gpu: ## run the tests that need a CUDA device, with PYTHON as it is; installs nothing
	$(PYTHON) -m pytest -m gpu $(shell grep -l "mark\.gpu" tests/test_*.py) $(ARGS)

test-long: $(DEV) ## run the tests that take minutes
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal -m "long and not gpu" $(ARGS)

bench: $(DEV) ## run every script in benchmarks/, one after another
	@set -e; for script in benchmarks/[!_]*.py; do echo "== $$script"; $(PY) "$$script" $(ARGS); done

peers: ## install the libraries that benchmarks compare with into .peers, an environment of their own
	PYTHON=$(PYTHON) benchmarks/peers/setup.sh

lint: $(DEV) ## check format, lint and types; change nothing
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

format: $(DEV) ## format the code and mend what the linter can mend
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean: ## remove the environment, caches and build products (not your runs/)
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path ./.git -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# An interrupted or failed set-up leaves no stamp and is taken up again. The environment is made anew if it lacks pip,
# as it does when Debian's python3-venv was missing at the first attempt.
define make_venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is missing or older than Python 3.10, which loghook needs: choose another with make PYTHON=..." >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
		{ echo "$(PYTHON) cannot make environments: install its venv package (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
endef

$(BASE): $(PINS)
	$(make_venv)
	$(PIP_INSTALL) --editable .
	@touch $@

$(DEV): $(PINS)
	$(make_venv)
	$(PIP_INSTALL) --editable ".[dev]"
	@touch $(BASE) $@
