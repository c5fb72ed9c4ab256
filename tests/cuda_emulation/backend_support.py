"""What the tests of backends/cuda.py share: the emulated module in place of the native one, and one
step of a layer through the public operators.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from cases import ConvCase, LinearCase
from emulator import load

from sparse_kernels import ops, plan
from sparse_kernels.backends import _cuda_native, cuda


@contextmanager
def serving_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, the CUDA backend serves CPU tensors; torch allocates, so all memory is theirs."""
    module = load()
    monkeypatch.setattr(plan, "_cache", {})  # choices made here are not those of other tests
    monkeypatch.setattr(_cuda_native, "native", lambda: module)
    monkeypatch.setattr(_cuda_native, "place", lambda x: (0, 0))
    monkeypatch.setattr(cuda, "supports", lambda op, x, values=None, block=None: None)
    module.forget_memory()
    module.set_strict(False)
    try:
        with plan.use_backend("cuda"):
            yield
    finally:
        module.set_strict(True)


def step(case: LinearCase | ConvCase, t: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """(y, x, values, bias) of a case's tensors after forward and backward; bias may be None."""
    x, values = t["x"].requires_grad_(), t["values"].requires_grad_()
    bias = None if t["bias"] is None else t["bias"].requires_grad_()
    if isinstance(case, ConvCase):
        y = ops.conv2d(x, values, *t["indices"], bias, geometry=case.geometry, relu=case.relu)
    else:
        y = ops.linear(
            x, values, *t["indices"], bias, out_features=case.out_features, relu=case.relu
        )
    y.backward(t["grad"])
    return y, x, values, bias
