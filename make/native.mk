# `make native`: builds the native module in place, for work from the source tree.
#   PYTHON=...   the interpreter it is built for (default python3; needs pybind11, cmake, ninja)
#   CUDA=ON      compiles the CUDA kernels too (default OFF: the build is much shorter)
#   EMULATE=ON   adds the variant "avx512-emulated" (16-lane tiles out of AVX2, for the tests)
#   SANITIZE=... "address,undefined" or "thread" (see make/sanitize.sh, which runs such a build)
#   NATIVE_BUILD the build directory
PYTHON ?= python3
CUDA ?= OFF
EMULATE ?= OFF
SANITIZE ?= OFF
NATIVE_BUILD ?= build/native
NATIVE_SUFFIX = $(shell $(PYTHON) -c "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))")

.PHONY: native sanitize
# In a directory of its own: a module that needs a preloaded runtime must not replace one that does not.
sanitize: ## run the kernels' tests under AddressSanitizer and UBSan (SANITIZE=thread: ThreadSanitizer)
	PYTHON=$(PYTHON) bash make/sanitize.sh $(if $(filter thread,$(SANITIZE)),thread,address)

native: ## build the native module in place (CUDA=ON, EMULATE=ON add to it)
	$(PYTHON) -m cmake -S . -B $(NATIVE_BUILD) -G Ninja -DCMAKE_BUILD_TYPE=Release \
	  -DCMAKE_MAKE_PROGRAM="$$($(PYTHON) -c 'import ninja, os; print(os.path.join(ninja.BIN_DIR, "ninja"))')" \
	  -DPython_EXECUTABLE="$$($(PYTHON) -c 'import sys; print(sys.executable)')" \
	  -Dpybind11_DIR="$$($(PYTHON) -m pybind11 --cmakedir)" \
	  -DSPARSE_KERNELS_CUDA=$(CUDA) -DSPARSE_KERNELS_EMULATE_AVX512=$(EMULATE) \
	  -DSPARSE_KERNELS_SANITIZE=$(SANITIZE)
	$(PYTHON) -m cmake --build $(NATIVE_BUILD)
	@# A module that cannot be imported never replaces one that can; the mv is atomic for running tests.
	PYTHONPATH=$(NATIVE_BUILD) env -u SPARSE_KERNELS_ISA $(PYTHON) -c "import _native"
	cp $(NATIVE_BUILD)/_native$(NATIVE_SUFFIX) sparse_kernels/.native.$$$$.tmp && \
	  mv -f sparse_kernels/.native.$$$$.tmp sparse_kernels/_native$(NATIVE_SUFFIX)
