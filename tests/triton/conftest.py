"""The Triton tests: interpreted on the CPU, or compiled, on a GPU or for one that is not there.

    TRITON_INTERPRET=1 pytest tests/triton -m "not slow"      kernels interpreted
    pytest tests/triton                                       compiled for sm_80, sm_90, sm_100
"""

from __future__ import annotations

from interpreter_support import INTERPRETING, correct_interpreter

from sparse_kernels.backends import triton as backend

if INTERPRETING and backend.installed():
    correct_interpreter()
