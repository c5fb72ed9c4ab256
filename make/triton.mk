# `make triton-check`: the Triton kernels without a GPU, in 4 minutes on 2 cores. Two runs, because the interpreter is
# chosen before triton is imported: interpreted against float64, then compiled for sm_80, sm_90 and sm_100.
# Triton alone is installed (about 1 GB on disk): it depends on no torch and on no CUDA.
#   TRITON=...       the requirement, for example "triton==3.6.*"
#   TRITON_MARKS=... which tests (default the core ones; "not gpu" for all of them, an hour and more)
TRITON ?= triton==3.9.*
TRITON_MARKS ?= not slow and not gpu

.PHONY: triton-check
triton-check: $(INSTALL_STAMP) ## Triton kernels interpreted against float64 and compiled for three chips, no GPU needed
	$(PIP) install '$(TRITON)'
	TRITON_INTERPRET=1 $(PYTEST) -n 2 -m "$(TRITON_MARKS)" tests/triton_kernels
	$(PYTEST) -n 2 -m "$(TRITON_MARKS)" tests/triton_kernels
