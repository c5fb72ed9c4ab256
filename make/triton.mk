# `make triton-check`: the Triton kernels without a GPU, in 4 minutes on 2 cores. Two runs, because the interpreter is
# chosen before triton is imported: interpreted against float64, then compiled for sm_80, sm_90 and sm_100.
# Triton alone is installed (about 1 GB on disk): it depends on no torch and on no CUDA.
#   TRITON=...       the requirement, for example "triton==3.6.*"
#   TRITON_MARKS=... which tests (default the core ones; "not gpu" for all of them)
TRITON ?= triton==3.9.*
TRITON_MARKS ?= not slow and not gpu

.PHONY: triton-check
triton-check: $(INSTALL_STAMP) ## Triton kernels interpreted against float64 and compiled for three chips, no GPU needed
	$(PIP) install '$(TRITON)'
	TRITON_INTERPRET=1 $(PYTEST) -n 2 -m "$(TRITON_MARKS)" tests/triton_kernels
	$(PYTEST) -n 2 -m "$(TRITON_MARKS)" tests/triton_kernels

# Every configuration that may be chosen, compiled for three chips: about a second of processor time each. Goes on where it
# was stopped (build/triton-compile.jsonl), and writes what is there so far into the document.
MINUTES ?= 60
.PHONY: triton-compile
triton-compile: $(INSTALL_STAMP) ## Every Triton configuration compiled (MINUTES=60, can be stopped), docs/gpu-compile.md rewritten
	$(PIP) install '$(TRITON)'
	$(VPY) tests/triton_kernels/compile_table.py --minutes $(MINUTES) --table docs/gpu-compile.md
