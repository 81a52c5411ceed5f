# Needs python3 (3.10 or newer) with venv, g++ and make; everything else is installed into .venv.
# PYTHON chooses the interpreter; PIP_ARGS is handed to pip, for instance
#   make test PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
INSTALLED := $(VENV)/.installed
LIBRARY := kdkernels/_C.abi3.so
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h')

# ninja and the tools of `make lint` are found in .venv without activating it.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: demo test build lint format bench sanitize clean

demo: build
	kdkernels demo

test: build
	python -m pytest

lint: $(INSTALLED)
	ruff check .
	ruff format --check .
	mypy
	clang-format --dry-run -Werror $(CSRC)

format: $(INSTALLED)
	ruff check --fix .
	ruff format .
	clang-format -i $(CSRC)

bench: build
	python -m benchmarks --quick

sanitize: $(INSTALLED)
	python tests/sanitize/run.py

clean:
	rm -rf $(VENV) build dist *.egg-info $(LIBRARY)

# Two steps, so that a change in csrc/ costs one incremental compile and no pip.
build: $(LIBRARY)

$(LIBRARY): $(INSTALLED) setup.py $(CSRC)
	KDKERNELS_REQUIRE_BUILD=1 python setup.py --quiet build_ext --inplace
	touch $@

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	python -m pip install --quiet $(PIP_ARGS) -c constraints.txt pip setuptools ninja torch
	KDKERNELS_SKIP_BUILD=1 python -m pip install --quiet $(PIP_ARGS) -c constraints.txt \
	    --no-build-isolation -e .[dev]
	touch $@
