# `make quickstart` and `make test` need nothing but Python 3.10-3.12; they build .venv once.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help install quickstart test test-fast lint format clean

help:
	@echo "make quickstart   distil a tiny student through all three stages on CPU"
	@echo "make test         all tests"
	@echo "make test-fast    the tests that start no training run and no Ray"
	@echo "make lint         ruff, check and format"
	@echo "make format       let ruff mend what it can"

install: $(VENV)/.installed

$(VENV)/.installed: setup.py requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -e ".[test]"
	touch $@

quickstart: install
	$(BIN)/python -m examples.quickstart.run

test: install
	$(BIN)/python -m pytest

test-fast: install
	$(BIN)/python -m pytest -m "not distributed and not e2e"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) outputs
