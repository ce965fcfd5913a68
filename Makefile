# `make` alone lists the targets. Nothing here needs more than make, Python 3.11 or newer and, for `services`, apt.

# Python of the virtual environment; by default the first of python3.11, python3.12, python3.13 and python3 that fits.
# The tests with another one, beside those with the first:
#     make test PYTHON=python3.13 VENV=.venv-3.13
PYTHON ?=
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0

# Address of one more wheel index, asked for torch alone. The default wheel of torch brings the CUDA
# libraries (several GB); a machine without a GPU can name an index of CPU wheels:
#     make setup TORCH_INDEX=https://...
TORCH_INDEX ?=

# Options for pytest: make test ARGS="-x tests/engine"
ARGS ?=

# Tests wait for processes and clocks half of the time, so three files run side by side on two cores; in the order of
# their names, which has slow ones at the beginning, and not one of them alone at the end.
SIDE_BY_SIDE := -n 3 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup services demo test test-all check format bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.stamp  ## create .venv with the pinned packages (seconds when it is there already)
	@test -z "$(PYTHON)" || test "$$($(PYTHON) -V 2> /dev/null)" = "$$($(BIN)/python -V)" || \
	  { echo "$(VENV) has $$($(BIN)/python -V), which is not $(PYTHON). Fix: make clean, or another VENV=" >&2; exit 1; }

$(VENV)/.stamp: pyproject.toml constraints.txt
	@test -x $(BIN)/python || { python=$$(.ci/python $(PYTHON)) && $$python -m venv $(VENV); }
	@echo "installing packages into $(VENV), $$($(BIN)/python -V) ..."
	@# torch first and alone, so that a CPU wheel that pip already knows, or TORCH_INDEX, is taken
	@$(BIN)/python -m pip install -q $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt $(TORCH)
	@$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

services:  ## install RabbitMQ and Redis for the tests, where they are missing (root, apt)
	@.ci/services

demo: setup  ## three hospitals that work by night and a server that works by day, here
	@$(BIN)/nightsplit demo

test: setup services  ## the tests, against a real RabbitMQ and a real Redis of their own (minutes)
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not campaign" $(ARGS)

test-all: setup services  ## these, and campaigns of kills, clusters, containers, full disks and bad links (half an hour)
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(ARGS)

check: setup  ## style, types and the rules of who may import whom
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache --no-logo
	@$(BIN)/python -m pytest -q tests/house/test_structure.py tests/house/test_errors.py tests/house/test_words.py

bench: setup services  ## measure transport and pipeline against the machine's own limits (minutes)
	@$(BIN)/python -m benchmarks.speed.transport
	@$(BIN)/python -m benchmarks.speed.pipeline

format: setup  ## let ruff rewrite the source in the one style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## remove .venv and every cache
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info build
