# Everything works with Python >= 3.11 and pip alone, without root: make quickstart, make test.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
WORKERS ?= 2
# Groups of tests (xdist_group) stay on a worker; not with pytest 9.2, where xdist 3.8 loses their
# names: hence the older one in constraints.txt.

# One thread per LAPACK call: on a busy small machine more threads are many times slower.
export OPENBLAS_NUM_THREADS := 1
export JAX_PLATFORMS ?= cpu
export MPLBACKEND := Agg
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
# Dozens of child processes of the tests would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help quickstart quadratic test test-fast lowering lint format notebooks bench docs data constraints clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(STAMPS)/experiments ## AdamW against Shampoo and KrADagrad* on scikit-learn's digits: a table and a plot
	@$(BIN)/kradagrad-jax compare configs/quickstart.toml --overwrite

quadratic: $(STAMPS)/experiments ## the synthetic problem of the KrADagrad paper: float32 against float64
	@$(BIN)/kradagrad-jax compare configs/quadratic.toml --overwrite

test: lint data ## lint, types and every test
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --typecheck

test-fast: $(STAMPS)/dev ## every test that is not marked slow
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m "not slow"

lowering: $(STAMPS)/dev $(STAMPS)/tpu-lowering $(STAMPS)/cuda-lowering ## compile for TPU and CUDA, without either (0.4 GB to download)
	QUICK=0 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup tests/lowering

lint: $(STAMPS)/dev ## ruff (rules and format) and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(STAMPS)/dev ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(STAMPS)/dev ## the .ipynb from their sources, after a change
	$(BIN)/python notebooks/generate.py

bench: $(STAMPS)/dev ## time per update as a multiple of the bare matrix products
	$(BIN)/python benchmarks/step_time.py

docs: $(STAMPS)/docs ## the documentation with the notebooks' outputs, into docs/_build
	env -u MPLBACKEND $(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

# Fashion-MNIST is a Debian package. It is unpacked here, not installed; the tests and tasks that
# want it skip or say so where it cannot be had.
DATA := .data
data: $(DATA)/stamp ## try to fetch Fashion-MNIST (Debian package) into .data
$(DATA)/stamp:
	@mkdir -p $(DATA) && touch $@
	@command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null && cd $(DATA) && \
	  { timeout 120 apt-get download -qq dataset-fashion-mnist 2>/dev/null || \
	    { timeout 120 apt-get update -qq && timeout 120 apt-get download -qq dataset-fashion-mnist; }; } \
	  >/dev/null 2>&1 && dpkg-deb -x dataset-fashion-mnist_*.deb . && rm -f dataset-fashion-mnist_*.deb \
	  || echo "Fashion-MNIST could not be fetched: its tests are skipped ('rm -r $(DATA)' to try again)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(STAMPS)/%: pyproject.toml constraints.txt | $(BIN)/python
	@mkdir -p $(STAMPS)
	@echo "installing into $(VENV), about a minute:"
	$(PIP_INSTALL) -e '.[$*]'
	@touch $@

clean: ## remove everything that was made here
	rm -rf $(VENV) $(DATA) build dist runs docs/_build docs/notebooks .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
