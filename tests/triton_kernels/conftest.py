"""The Triton tests: interpreted on the CPU, or compiled, on a GPU or for one that is not there.

    TRITON_INTERPRET=1 pytest tests/triton_kernels -m "not slow"     # kernels interpreted
    pytest tests/triton_kernels                                      # compiled for three chips

The folder must not be called `triton`: tests/ is on the path, and torch takes a folder of that name
for the package where the package is not installed.
"""

from __future__ import annotations

import pytest
from interpreter_support import INTERPRETING, correct_interpreter

from sparse_kernels.backends import triton as backend

if INTERPRETING and backend.installed():
    correct_interpreter()


@pytest.fixture(autouse=True)
def in_float32(strict_products: None) -> None:
    """float32 means float32, whatever ran before; the interpreter knows no TF32 anyway."""
