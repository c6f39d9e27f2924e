# make chat: install and talk to the embedded model.  make test: install what the tests need and run them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Python compiles a module when it is first imported, which are few of the thousands that torch and transformers
# have.
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q --no-compile

.PHONY: chat test test-deep chips conformance campaigns notebooks lint check train docs clean

# Ctrl-C reaches make and the shell, too. The shell waits for the chat, which says itself that it was interrupted,
# and make is told that nothing failed.
chat: $(VENV)/core
	@trap : INT; $(BIN)/python -m refimpl.chat || test $$? -eq 130

# Each process gets half of the tests, and one that is done takes over half of what is left to the other.
test: $(VENV)/test
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-deep: $(VENV)/test
	HYPOTHESIS_PROFILE=deep $(BIN)/python -m pytest -n 2 --dist worksteal

# Triton's kernels compiled for GPUs other than Hopper; `make test` does it for Hopper.
chips: $(VENV)/test
	$(BIN)/python -m pytest -n 2 -m chips tests/test_triton.py

# Every kernel under every law at the quick level; `make test` has the smoke level, one real size an operation. It
# takes some five minutes of two cores, and one more where kernels are compiled for the first time, for each level of
# SIMD.
conformance: $(VENV)/test
	$(BIN)/python -m refimpl.conformance --processes 2

# Millions of damaged and hostile inputs; the tests run a short form (see docs/reliability.md).
campaigns: $(VENV)/test
	$(BIN)/python -m tests.campaigns --long --processes $$(nproc || echo 2)

# Every notebook from a clean kernel, and every exercise's solution.
notebooks: $(VENV)/test
	$(BIN)/python -m pytest -n 2 -m notebooks tests/test_notebooks.py

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

check: lint test chips notebooks docs

# The site in build/docs (pages, notebooks, API, blocks to touch), after whatever a program writes in the pages was
# written anew. Its search needs a server: `.venv/bin/python -m http.server -d build/docs`.
docs: $(VENV)/test
	$(BIN)/python docs/site/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q -f docs/site/mkdocs.yml

# Trains the embedded model anew (see docs/tiny.md); needs an hour or so on two cores, minutes on a GPU.
train: $(VENV)/test
	$(BIN)/python -m refimpl.training.train

$(VENV)/core: pyproject.toml setup.py $(wildcard kernels/*.pyx kernels/*.pxi)
	@$(PYTHON) -c 'import sys; sys.exit("refimpl needs Python 3.11 or newer, and found %d.%d" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@echo "Installing into $(VENV) ..." >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) -e . >&2
	@touch $@

# The exact torch first: with it in place no other requirement pulls a build with CUDA.
$(VENV)/test: $(VENV)/core
	@$(PIP) torch==2.13.0
	@$(PIP) -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
