# Five targets; each sets up all it needs on a Debian or Ubuntu with Python 3.11 or newer and pip. PyPI's torch for Linux brings CUDA
# along; where that is unwanted, give pip the index of PyTorch's CPU builds: make demo TORCH='torch==2.13.0 --index-url URL'.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0
PIP := $(PYTHON) -m pip --python $(BIN)/python --quiet --disable-pip-version-check # Debian splits venv's own pip off into python3-venv

.PHONY: setup demo test lint docs

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PIP) install $(TORCH)
	$(PIP) install -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/icae demo

test: setup
	$(BIN)/python -m pytest -n logical --maxprocesses 4

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup
	$(BIN)/python docs/make.py
