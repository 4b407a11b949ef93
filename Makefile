# Two commands on a fresh machine with Python 3.11+ and make:
#   make demo   sets everything up and runs the main job on a real model
#   make test   sets everything up and passes lint, types and tests
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo test lint types tests interrupts extras bench clean

demo: .venv/ready
	$(BIN)/python examples/demo.py

test: lint types tests

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: .venv/ready
	$(BIN)/mypy

tests: .venv/ready
	$(BIN)/python -m pytest -n $(WORKERS)

# Real signals to every command that writes, 50 times each at moments spread over its run; half an hour or so.
interrupts: .venv/ready
	$(BIN)/python tests/interrupting.py --tries 50
	$(BIN)/python tests/interrupting.py --tries 4 --processes

# What each extra brings is what its commands need: the README's commands, in an environment of that and no more.
extras: .venv/ready
	$(BIN)/python .ci/extras.py

bench: .venv/ready
	for script in startup numerics undo_size speed scaling ranks combine quantize nf4_merge eval first_adapter train dylora adalora doctor; do $(BIN)/python benchmarks/$$script.py --record; done

# The environment is made anew when what it is made from changes.
.venv/ready: pyproject.toml constraints.txt
	@echo "Setting up .venv (once; torch and transformers take a few minutes to download) ..."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,examples]'
	@touch $@

clean:
	rm -rf .venv .demo build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis benchmarks/.data
