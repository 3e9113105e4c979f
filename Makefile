# `make demo` and `make test` work on a fresh clone: they make their own environment in .venv first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Some hundred processes start in the tests: the sources are compiled once.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint bench soak fuzz audit install lock clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    handwritten digits, end to end, on this machine (5 minutes)"
	@echo "make test    the test suite"
	@echo "make lint    style and security checks"
	@echo "make bench   performance ratios, side by side (half an hour)"
	@echo "make soak    a run that goes on while its processes are killed, 250 times in all"
	@echo "make fuzz    some thousand requests that nobody thought of, against a service with a tiny model"
	@echo "make audit   known vulnerabilities of what requirements.lock pins; asks an advisory service"
	@echo "make lock    pin the newest versions of everything in requirements.lock"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "onthefly needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

demo: install
	$(BIN)/onthefly demo

test: install
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: install
	$(BIN)/python -m tests.benchmarks

soak: install
	$(BIN)/python -m tests.soak --kills 200 --seed 1
	$(BIN)/python -m tests.soak --kills 50 --seed 2 --patience 2

fuzz: install
	$(BIN)/python -m tests.generator_service.fuzz --examples 200

audit: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/pip-audit --strict --disable-pip --no-deps --requirement requirements.lock

lock:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --upgrade \
	    --no-header --no-annotate --no-emit-index-url --no-emit-find-links --output-file requirements.lock

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
