# make help lists the targets.
.DEFAULT_GOAL := help
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

.PHONY: install demo test check tensorboard constraints clean help
install: $(VENV)/installed  ## Make the virtual environment with the tested set

demo: install  ## Train teachers on arithmetic, distill them, print a table and draw the curves
	$(BIN)/lightning-kd demo

test: check  ## Check style and types, then run all tests
	$(BIN)/python -m pytest

check: install  ## Style and types only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

tensorboard: install  ## Look at the runs
	$(BIN)/tensorboard --logdir runs

constraints: install  ## Write down the installed set
	( sed -n '/^#/p' constraints.txt; $(BIN)/pip freeze --exclude-editable --exclude lightning-kd \
	  | sed 's/+cpu$$//' ) > constraints.new && mv constraints.new constraints.txt

clean:  ## Remove what was built
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

help:  ## This list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16
