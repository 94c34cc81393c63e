# make train        install on first use, then train a small model on this machine
# make test         the whole test suite, with coverage
# make test-hosts   the host tests with every release of torchtitan that we support, side by side
# make lint         formatting, style and types
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

INSTALLED := $(VENV)/.ezpz_moe_installed

.PHONY: train test test-hosts lint clean

train: $(INSTALLED)
	$(VENV)/bin/ezpz-moe train $(JOB) $(ARGS)

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest -n auto --dist loadfile --cov $(ARGS)

test-hosts: $(INSTALLED)
	$(VENV)/bin/python -m nox $(if $(HOST),--session checkout -- $(HOST))

lint: $(INSTALLED)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

# Again whenever the dependencies change.
$(INSTALLED): pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --editable '.[dev]'
	touch $@

clean:
	rm -rf build dist .nox .coverage .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
