# Everything happens in .venv, made on first use. `make help` lists the targets.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SHELL  := bash
ARGS   ?=

SOURCES     := $(shell find csrc -type f)
CXX_SOURCES := $(filter %.h %.cpp %.cu %.cuh,$(SOURCES))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test bench gpu gpu-facts gpu-kernels gpu-networks gpu-build lint wheel test-wheel clean check

help:  ## list the targets
	@echo "usage: make TARGET [ARGS='--more options'] [PYTHON=python3.12]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

train: $(VENV)/.installed  ## train a fused ResNet-20 on handwritten digits (ARGS go to fused-resnet train)
	@$(BIN)/fused-resnet train $(ARGS)

test: $(VENV)/.installed  ## run the tests, a process for each core (ARGS go to pytest)
	@$(BIN)/python -m pytest --numprocesses auto --dist loadfile $(ARGS)

bench: $(VENV)/.installed  ## measure the fused operations and networks beside stock PyTorch (ARGS go to fused-resnet bench)
	@$(BIN)/fused-resnet bench $(ARGS)
	@$(BIN)/python -m pytest benchmarks --benchmark-columns=median,iqr,rounds --benchmark-name=short

# A GPU machine brings its own torch and may have no network: nothing is installed, the extension is built in place.
# Records go to $OUT, or to benchmarks/results/DEVICE. Without a GPU: make gpu ARGS='--device cpu --quick --out /tmp/dry'.
gpu: gpu-facts gpu-kernels gpu-networks  ## measure on this machine's GPU with its own Python, which has torch (ARGS go to benchmarks/gpu.py)

gpu-facts: gpu-build  ## the first part of gpu: the machine, the kernels' tests, stock PyTorch
	@$(PYTHON) benchmarks/gpu.py facts $(ARGS)

gpu-kernels: gpu-build  ## the second: every engine's kernels and every block
	@$(PYTHON) benchmarks/gpu.py kernels $(ARGS)

gpu-networks: gpu-build  ## the third: whole networks against stock and torch.compile
	@$(PYTHON) benchmarks/gpu.py networks $(ARGS)

# What was built elsewhere and brought along is taken as it is (make clean, to build anew); where nothing can be built,
# Triton serves alone. doctor says which.
gpu-build:
	@if [ -e fused_resnet/libfused_resnet_cuda.so ]; then echo "fused_resnet/*.so are there: not built again"; \
	else $(PYTHON) setup.py --quiet build_ext --inplace || echo "the extension was not built here" >&2; fi

lint: $(VENV)/.installed  ## check style and types, change nothing
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy fused_resnet
	@$(BIN)/clang-format --dry-run --Werror $(CXX_SOURCES)

# NATIVE=required makes a wheel without the CUDA kernels where there is no nvcc. Torch's libraries stay outside; the tag
# of the oldest glibc that the rest runs on is put into the file's name.
wheel: NATIVE ?= cuda
wheel: $(VENV)/.installed  ## build this Python's wheel, a pure Python one and the source distribution in dist/
	@rm -rf build/lib* build/bdist* build/wheel
	@FUSED_RESNET_NATIVE=$(NATIVE) $(BIN)/python -m build --no-isolation --wheel --outdir build/wheel
	@PATH=$(abspath $(BIN)):$$PATH auditwheel repair --wheel-dir dist \
	    --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcuda*' build/wheel/*.whl
	@rm -rf build/lib* build/bdist*
	@FUSED_RESNET_NATIVE=off $(BIN)/python -m build --no-isolation --wheel --outdir dist
	@$(BIN)/python -m build --no-isolation --sdist --outdir dist
	@ls -sh dist
	@[ -z "$$(find dist -size +50M)" ] || { echo "dist holds a file above 50 MB" >&2; exit 1; }

test-wheel:  ## try what `make wheel` made with torch 2.10, 2.11, 2.13 and 2.15 (ARGS='--python PATH …' for environments at hand)
	@$(PYTHON) tests/building/wheel/environments.py $(ARGS)

clean:  ## remove what the build left; runs/ stays, and so does .venv
	@rm -rf build dist *.egg-info fused_resnet/*.so fused_resnet/build_info.json
	@rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks $(VENV)/.installed

# What the build needs before the package itself can be installed; torch is the one that the extension is built against.
$(VENV)/.requirements: constraints.txt | check
	@echo "installing the pinned dependencies into $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --constraint constraints.txt setuptools wheel cmake ninja pybind11 torch
	@touch $@

$(VENV)/.installed: $(VENV)/.requirements pyproject.toml setup.py CMakeLists.txt $(SOURCES)
	@echo "building the extension"
	@$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

# What is missing on this machine, and the mend. The package would build without a compiler, on slow reference kernels.
check:
	@command -v $(PYTHON) >/dev/null \
	    || { echo "$(PYTHON) is missing; mend: sudo apt install python3, or make PYTHON=/path/to/python3"; exit 1; } >&2
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	    || { echo "Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) -V); mend: make PYTHON=/path/to/newer"; exit 1; } >&2
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	    || { echo "$(PYTHON) cannot make virtual environments; mend: sudo apt install python3-venv"; exit 1; } >&2
	@command -v $(firstword $(CXX)) >/dev/null || command -v c++ >/dev/null || command -v clang++ >/dev/null \
	    || { echo "a C++ compiler ($(CXX)) is missing; mend: sudo apt install g++"; exit 1; } >&2
