# Two commands on a fresh machine: `make demo` and `make test`. Needs Python 3.11 or newer and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2

.PHONY: demo test test-slow test-long test-ray lint docs bench clean help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "fedattack needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(VENV)/.installed  ## the main job on embedded data: HCGLA against a live federation at 0.1 %
	$(BIN)/python simulations/run.py --attack hcgla --compression 0.001

test: $(VENV)/.installed lint  ## style, types and the quick tests (a few minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist worksteal

lint: $(VENV)/.installed  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-slow: test-long test-ray  ## real data, two-node Ray, `flwr run`, notebooks (tens of minutes)

test-long: $(VENV)/.installed  ## those of them without Ray, two at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not ray" -n 2 --dist worksteal

test-ray: $(VENV)/.installed  ## those that start a Ray of their own, one after another
	$(BIN)/python -m pytest -m "slow and ray"

docs: $(VENV)/.installed  ## the documents, in build/docs/index.html; a link that leads nowhere ends the build
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(VENV)/.installed  ## the benchmark suite
	$(BIN)/python -m simulations.bench --list

clean:  ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
