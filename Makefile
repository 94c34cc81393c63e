# make train        install on first use, then train a small model on this machine
# make test         the tests, in some ten minutes on two cores
# make test-smoke   a few tests with every other release of torchtitan that we support
# make test-hosts   all host tests with every release, side by side
# make test-all     everything: also the tests marked "full", with coverage, test-hosts, and torchao
# make lint         formatting, style, types, and which way imports go
# make docs         the site of docs/, in site/; a link to nowhere fails it
# make reference    the tables of the documents, written again from the code
# make clean        remove caches and build products (the environment and outputs/ stay)
#
#   make train JOB=flavors/jobs/debug_cpu.toml ARGS="--training.steps 5"
#   make test ARGS="-k data"
#   make test-hosts HOST=/path/to/torchtitan

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
JOB ?= flavors/jobs/debug_cpu.toml
ARGS ?=
HOST ?=

# Files stay whole, for the runs that their tests share; the order is conftest.py's.
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder
INSTALLED := $(VENV)/.ezpz_moe_installed

# Whatever the shell says: or each process that imports torch compiles all its files anew, which takes
# three times as long as the rest of the import.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train test test-smoke test-hosts test-all lint docs reference clean

train: $(INSTALLED)
	$(VENV)/bin/ezpz-moe train $(JOB) $(ARGS)

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest $(PARALLEL) $(ARGS)

test-smoke: $(INSTALLED)
	$(VENV)/bin/python -m nox --session smoke

test-hosts: $(INSTALLED)
	$(VENV)/bin/python -m nox --session $(if $(HOST),checkout -- $(HOST),release)

test-all: $(INSTALLED)
	$(VENV)/bin/python -m pytest $(PARALLEL) -m "full or not full" --cov $(ARGS)
	$(VENV)/bin/python -m nox --session release torchao

lint: $(INSTALLED)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo

docs: $(INSTALLED)
	$(VENV)/bin/zensical build --strict --clean
	@echo "Open site/index.html, or type $(VENV)/bin/zensical serve, which also searches"

# Not those that try things for minutes: make_resume_table.py, make_neighbour_table.py.
reference: $(INSTALLED)
	$(VENV)/bin/python scripts/make_reference.py
	$(VENV)/bin/python scripts/make_flavor_table.py
	$(VENV)/bin/python scripts/make_host_tables.py
	$(VENV)/bin/python scripts/make_moving_tables.py
	$(VENV)/bin/python scripts/make_routing_tables.py

# Again whenever the dependencies change. Of what is installed, Python compiles what it imports.
$(INSTALLED): pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --no-compile --editable '.[dev]'
	touch $@

clean:
	rm -rf build dist site .cache .nox .coverage .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
