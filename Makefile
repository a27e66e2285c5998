# Everything a fresh machine needs is Python 3.10 or newer and make.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo kernels-demo test matrix browser lint notebook clean

# Runs the model that ships with exl.
demo: .venv/installed
	@$(BIN)/exl generate "Once upon a time" --max-tokens 200 --temperature 0

test: .venv/installed-test lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -rfEs --durations=15 -m "not matrix and not browser"

# Every variant of every kernel for every architecture: what `make test` takes a sample of. About ten minutes.
matrix: .venv/installed-test
	$(BIN)/python -m pytest -rfEs -m matrix

# The Gradio demo in a real browser; needs the system's chromium besides.
browser: .venv/installed-browser
	$(BIN)/python -m pytest -rfEs tests/browser

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The bundled model through the CUDA sources, compiled by g++ for this CPU: word for word as through torch.
kernels-demo: .venv/installed
	@$(BIN)/python -m scripts.kernels_demo

# Runs examples/quickstart.ipynb and saves it with its outputs.
notebook: .venv/installed-test
	$(BIN)/python scripts/run_notebook.py

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch first and pinned: unpinned, or as another package's dependency, it may bring gigabytes of CUDA libraries.
.venv/installed: .venv/bin/python setup.py constraints.txt
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-test: .venv/installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

.venv/installed-browser: .venv/installed-test
	$(PIP) install --quiet --constraint constraints.txt --editable '.[demo,browser]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
