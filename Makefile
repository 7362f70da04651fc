# One command each: `make demo`, `make test`, `make lint`, `make bench`. All make .venv when needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test lint format bench clean

help:
	@echo 'make demo    map the sample scene: demo/sample.tif and demo/sample.png'
	@echo 'make test    run the tests'
	@echo 'make lint    ruff and mypy'
	@echo 'make format  let ruff lay the code out'
	@echo 'make bench   measure the speed of predict'
	@echo 'make setup   only make .venv, with what tests and lint need'
	@echo 'make clean   remove .venv, demo/ and caches'

# A half-made environment would look finished to the next run, so it is taken away again.
$(BIN)/python:
	@command -v '$(PYTHON)' >/dev/null || { \
	  echo "soundmap needs Python 3.11 or newer, and there is no '$(PYTHON)': install it, or name one, for example PYTHON=python3.12" >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "soundmap needs Python 3.11 or newer, and '$(PYTHON)' is $$('$(PYTHON)' --version 2>&1): name a newer one, for example PYTHON=python3.12" >&2; exit 1; }
	@'$(PYTHON)' -m venv '$(VENV)' || { rm -rf '$(VENV)'; \
	  echo "'$(PYTHON)' cannot make a virtual environment: on Debian and Ubuntu, install python3-venv" >&2; exit 1; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing soundmap into $(VENV): a few minutes the first time'
	@$(PIP) install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing soundmap with what its tests need into $(VENV): a few minutes the first time'
	@$(PIP) install --quiet -c constraints.txt -e '.[dev]'
	@touch $(VENV)/.installed $@

setup: $(VENV)/.installed-dev

demo: $(VENV)/.installed
	@mkdir -p demo
	$(BIN)/soundmap predict --imagery sample --out demo/sample.tif --picture demo/sample.png --overwrite
	@echo
	@echo 'The map:     $(CURDIR)/demo/sample.tif   (a band per sound; opens in QGIS)'
	@echo 'Its picture: $(CURDIR)/demo/sample.png'

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/predict.py

clean:
	rm -rf $(VENV) demo dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
