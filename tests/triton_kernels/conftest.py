"""The Triton tests: interpreted on the CPU, or compiled, on a GPU or for one that is not there.

    TRITON_INTERPRET=1 pytest tests/triton_kernels -m "not slow"     # kernels interpreted
    pytest tests/triton_kernels                                      # compiled for three chips

The folder must not be called `triton`: tests/ is on the path, and torch takes a folder of that name
for the package where the package is not installed.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from interpreter_support import INTERPRETING, correct_interpreter

from sparse_kernels.backends import triton as backend

if INTERPRETING and backend.installed():
    correct_interpreter()


@pytest.fixture(autouse=True)
def strict_products() -> Iterator[None]:
    """float32 means float32, whatever ran before; the interpreter knows no TF32 anyway."""
    holders = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [holder.fp32_precision for holder in holders]
    for holder in holders:
        holder.fp32_precision = "ieee"
    yield
    for holder, precision in zip(holders, before, strict=True):
        holder.fp32_precision = precision
