PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests and quickstart work on tiny tensors, where a second thread gains nothing and waits, spinning, for a core that is busy.
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test lint venv clean

quickstart: venv
	PATH="$(CURDIR)/$(BIN):$$PATH" bash exp_specs/quickstart/run.sh

test: lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: venv
	$(BIN)/ruff check .

venv: $(VENV)/installed

# The editable install follows the Python files by itself; what is listed here needs a new build or other packages.
$(VENV)/installed: pyproject.toml setup.py $(wildcard csrc/* constraints/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints/tested.txt torch
	if ! $(BIN)/python -c "import importlib.metadata as m; exit('triton' not in str(m.requires('torch')))"; \
	then set -- -c constraints/cpu.txt; fi; \
	$(BIN)/pip install -c constraints/tested.txt "$$@" -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/_native* .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
