# Everything a person types. `make help` lists it. Only the targets that make a virtual environment need the network.

PYTHON ?= python3
VENV ?= .venv
# The torch requirement. On a machine with a GPU choose your own build, for example
#   make venv TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"
# A torch that is already in $(VENV) and satisfies the requirement is left alone.
TORCH ?= torch==2.13.0

VPY := $(VENV)/bin/python
PIP := $(VPY) -m pip --disable-pip-version-check
# One stamp per torch requirement: another TORCH= means another install, the same one means none.
TORCH_STAMP := $(VENV)/.torch-$(firstword $(shell printf '%s' '$(TORCH)' | cksum))
INSTALL_STAMP := $(VENV)/.installed
TOOLS_STAMP := $(VENV)/.tools

CPP_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null | sort)
PACKAGE_SOURCES := $(shell find sparse_kernels -type f -not -name '*.so' -not -name '*.pyc' 2>/dev/null | sort)
BUILD_FILES := $(wildcard pyproject.toml setup.py CMakeLists.txt MANIFEST.in make/*.cmake csrc/CMakeLists.txt)

# The console script, not `python -m pytest`: it does not put the working directory on sys.path, so that the tests meet
# the package that was installed, native module included, and not the source tree. tests/test_architecture.py checks it.
# One OpenMP thread per worker: two workers share two cores. Tests of threading ask torch for their own number.
PYTEST := SPARSE_KERNELS_INSTALLED=1 OMP_NUM_THREADS=1 $(VENV)/bin/pytest -p no:cacheprovider
TEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help venv dev-tools demo test test-full lint format cuda-compile cuda-emulation bench gpu-check clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH='$(TORCH)'"

venv: $(INSTALL_STAMP) ## make .venv with torch (TORCH= chooses which) and this package in it

$(VPY):
	$(PYTHON) -m venv $(VENV)

$(TORCH_STAMP): | $(VPY)
	$(PIP) install $(TORCH)
	@rm -f $(VENV)/.torch-*
	@touch $@

# Isolated build: pip fetches pybind11, cmake and ninja for it. torch is installed already and is not touched.
# build/lib* goes first: setuptools would pack modules that the sources no longer have.
$(INSTALL_STAMP): $(TORCH_STAMP) $(CPP_SOURCES) $(PACKAGE_SOURCES) $(BUILD_FILES)
	@rm -rf build/lib* build/bdist*
	$(PIP) install '.[test,report]'
	@touch $@

demo: $(INSTALL_STAMP) ## train a wide MLP at 5 % density beside dense on the shipped MNIST sample
	$(VENV)/bin/sparse-kernels train --preset demo $(DEMO_ARGS)

test: $(INSTALL_STAMP) ## core tests, under 6 minutes on 2 cores, against the installed package
	$(PYTEST) -n 2 -m "not slow and not gpu" --ignore tests/cuda_emulation $(TEST_ARGS) tests

test-full: $(INSTALL_STAMP) $(TOOLS_STAMP) ## everything: slow tests, every instruction set of this CPU, qemu where it is installed
	$(VPY) tests/cuda_emulation/emulation_build.py
	$(PYTEST) -n 2 $(TEST_ARGS) tests
	VENV=$(VENV) bash make/test_isas.sh
	PYTHON=$(VENV)/bin/python bash make/sanitize.sh address

# Tools of developers, and the build requirements for builds without isolation (test-full, gpu-check, make native).
# Names only, so that the package is not built again for them.
$(TOOLS_STAMP): $(TORCH_STAMP) pyproject.toml
	$(PIP) install ruff mypy clang-format setuptools pybind11 cmake ninja
	@touch $@

dev-tools: $(INSTALL_STAMP) $(TOOLS_STAMP) ## make venv, and ruff, mypy, clang-format and the build tools in it

lint: $(INSTALL_STAMP) $(TOOLS_STAMP) ## ruff, mypy and clang-format, check only
	@set -x; status=0; \
	$(VENV)/bin/ruff check . || status=1; \
	$(VENV)/bin/ruff format --check . || status=1; \
	$(VENV)/bin/mypy sparse_kernels || status=1; \
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_SOURCES) || status=1; \
	exit $$status

format: $(TOOLS_STAMP) ## rewrite the sources as ruff and clang-format want them
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP_SOURCES)

cuda-compile: ## compile every csrc/cuda/*.cu for every architecture (or ARCH="sm_80 ..."), fail on register spills
	$(PYTHON) tools/cuda_compile.py $(foreach arch,$(ARCH),--arch $(arch))

# Needs a C++ compiler, neither nvcc nor a GPU. Built first: two test workers would both build it.
cuda-emulation: $(INSTALL_STAMP) $(TOOLS_STAMP) ## run the CUDA kernels on the CPU, a small set of cases (all: make test-full)
	$(VPY) tests/cuda_emulation/emulation_build.py checked
	$(PYTEST) -n 2 -m "not slow and not gpu" $(TEST_ARGS) tests/cuda_emulation

bench: $(INSTALL_STAMP) ## time every operator against dense PyTorch (BENCH_ARGS for pytest-benchmark)
	$(VENV)/bin/pytest -p no:cacheprovider --benchmark-only benchmarks $(BENCH_ARGS)

# No virtual environment of ours here: a GPU machine brings its own torch and may have no network.
DEVICE ?= cuda
SIZE ?= full
gpu-check: ## build without network, smoke, gpu tests, sanitizer, benchmarks (DEVICE=cpu SIZE=small rehearses; PART=bench: one part)
	$(PYTHON) tools/gpu_check.py --device $(DEVICE) --size $(SIZE) $(if $(PART),--part $(PART)) $(if $(RESULTS),--results $(RESULTS)) $(GPU_ARGS)

clean: ## remove build products and .venv
	rm -rf build dist *.egg-info .venv .venv-ci .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f sparse_kernels/_native*.so
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

-include make/native.mk
-include make/triton.mk
