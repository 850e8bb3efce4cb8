# make help lists the targets.
.DEFAULT_GOAL := help
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test]'
	touch $@

# Its import writes to everybody's output, so that it stands beside and sees what is installed here.
$(VENV)-deepspeed/installed: $(VENV)/installed
	$(PYTHON) -m venv $(VENV)-deepspeed
	packages=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	  echo "import site; site.addsitedir('$$packages')" > \
	  $$($(VENV)-deepspeed/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth
	DS_BUILD_OPS=0 $(VENV)-deepspeed/bin/python -m pip install --quiet -c constraints.txt deepspeed==0.19.8
	touch $@

# The lowest versions that pyproject.toml allows of what the library imports, to see that they do.
$(VENV)-lowest/installed: pyproject.toml
	mkdir -p build
	$(PYTHON) -m tests.support.lower_bounds > build/lowest.txt
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet -c build/lowest.txt -e '.[test]'
	touch $@

.PHONY: install deepspeed demo test test-quick test-lowest gpu check dist docs docs-links tensorboard constraints clean help
install: $(VENV)/installed  ## Make the virtual environment with the tested set

deepspeed: $(VENV)-deepspeed/installed  ## Add an environment with DeepSpeed, for its tests

demo: install  ## Train teachers on arithmetic, distill them, print a table and draw the curves
	$(BIN)/lightning-kd demo

# Two processes of one thread each: the models are so small that a second thread only waits. A file's tests
# stay together, so that what they share is made once.
test: check  ## Check style and types, then run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-quick: install  ## Run the tests that start no process and take no seconds
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not (processes or command_line or slow)"

test-lowest: $(VENV)-lowest/installed  ## Run the same with the lowest versions that are allowed
	OMP_NUM_THREADS=1 $(VENV)-lowest/bin/python -m pytest -n 2 -m "not (processes or command_line or slow)"

gpu: install  ## Test and measure on a GPU, in ten minutes; without one it says so
	$(BIN)/python -m tests.benchmarks.gpu

check: install  ## Style and types only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install  ## Build the site into build/docs, without a network; a warning or a broken link is an error
	$(BIN)/python -m sphinx -b html -EnW --keep-going docs build/docs

docs-links: install  ## Check the site's links to other sites, which needs a network
	DOCS_NETWORK=1 $(BIN)/python -m sphinx -b linkcheck docs build/docs-links

tensorboard: install  ## Look at the runs
	$(BIN)/tensorboard --logdir runs

constraints: install  ## Write down the installed set
	( sed -n '/^#/p' constraints.txt; $(BIN)/pip freeze --exclude-editable --exclude lightning-kd \
	  | sed 's/+cpu$$//' ) > constraints.new && mv constraints.new constraints.txt

# Of the commit, so that nothing gets in that git does not know; the wheel is built from the source distribution.
dist: install  ## Build the source distribution and the wheel of the commit, and check both
	rm -rf build/source dist
	mkdir -p build/source
	git archive HEAD | tar -x -C build/source
	$(BIN)/python -m build --no-isolation --outdir dist build/source
	$(BIN)/python -m twine check --strict dist/*

clean:  ## Remove what was built
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

help:  ## This list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16
