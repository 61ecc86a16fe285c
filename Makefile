# FengShen. `make` alone lists the targets. Everything runs from .venv, which `make setup` makes with PYTHON (any Python from 3.11).
# PY names another interpreter that already has what is needed (a GPU machine without internet): make test-gpu PY=python3
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
PY ?= .venv/bin/python
PYTEST ?= $(PY) -m pytest -q --durations=8
READY := .venv/ready

# DeepSpeed compiles with ninja and finds it on PATH only; tests train small tensors, which more threads than cores make slower, not faster.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
test%: export OMP_NUM_THREADS := 1
# Some containers forbid Python to keep what it has compiled; a process then starts in 50 s instead of 15, and the tests start hundreds.
unexport PYTHONDONTWRITEBYTECODE
# Two notebooks at a time; `--n_workers 0` would run them all in one process, where one notebook's state reaches the next.
NOTEBOOKS = $(PY) -c 'from nbdev.test import nbdev_test; nbdev_test()' --n_workers 2

.PHONY: help setup demo export test test-house test-notebooks test-python test-slow test-gpu gpu-wheels readme llms docs clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(if $(filter .venv/bin/python,$(PY)),$(READY)) ## make .venv and install the pinned requirements into it (1 to 3 minutes, once)
	@:

$(READY): constraints.txt settings.ini setup.py tools/install.py
	@$(PYTHON) tools/install.py
	@touch $@

demo: setup ## finetune a small GPT-2 on question-answer pairs with DeepSpeed, export it, and let it answer
	@$(PY) -m fengshen.examples.demo

export: setup ## export the notebooks to fengshen/, clean them, and draw README.md and llms.txt from them
	@nbdev_export
	@nbdev_clean
	@$(MAKE) --no-print-directory readme llms

test: setup ## every test that needs neither a GPU nor much patience, the quickest first
	@$(MAKE) --no-print-directory test-house
	@$(MAKE) --no-print-directory test-notebooks
	@$(MAKE) --no-print-directory test-python

test-house: setup ## is everything in its place: notebooks in step, layers, names, links, navigation, style
	@echo "== house: notebooks and package in step, layers, style, documentation"
	@$(PYTEST) -x tests/house

test-notebooks: setup ## run the notebooks
	@echo "== notebooks: $$(find nbs -name '*.ipynb' -not -path '*/.*' | wc -l) of them, two at a time"
	@$(PY) tools/pages.py cells
	@$(NOTEBOOKS)

test-python: setup ## the tests in tests/ (recipes, properties, processes, the wheel)
	@echo "== tests: properties, invariants, recipes, the wheel in an empty environment"
	@$(PYTEST) tests --ignore tests/house -n 2 --dist loadfile

test-slow: setup ## what takes longer than a test should
	@$(NOTEBOOKS) --flags slow
	@$(PYTEST) -m slow tests

test-gpu: setup ## what needs a GPU; on a machine without internet see `make gpu-wheels`
	@PYTHONPATH=$(CURDIR):$$PYTHONPATH $(PYTEST) -m gpu tests
	@if $(PY) -c 'import nbdev' 2>/dev/null; then $(NOTEBOOKS) --flags gpu; else echo "notebooks with gpu cells: not run, nbdev is not installed"; fi

gpu-wheels: setup ## gather into .whl/ what a GPU machine without internet lacks (HAVE=names of what it has, PYTHON_THERE=3.12)
	@$(PY) -m tools.gpu_wheels --have $(or $(HAVE),tools/gpu_machine.txt) --python $(or $(PYTHON_THERE),3.12)

readme: setup ## README.md from nbs/index.ipynb
	@$(PY) tools/readme.py

llms: setup ## llms.txt from the site's navigation
	@$(PY) tools/pages.py llms

docs: setup ## the documentation site in _docs/ (needs Quarto)
	@if command -v quarto >/dev/null; then PYTHONPATH=$(CURDIR) nbdev_docs; \
	else echo "make docs: Quarto is not on PATH; it renders the site (quarto.org). What can be checked without it, make test-house checks."; exit 1; fi

clean: ## remove what was built; .venv and runs/ stay
	@rm -rf _proc _docs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .whl nbs/nbdev.yml
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
