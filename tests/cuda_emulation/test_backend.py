"""backends/cuda.py itself, from the autograd Functions down, with the emulated module for the
native one and CPU tensors for GPU tensors.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import (
    CONV_CASES,
    LINEAR_CASES,
    ConvCase,
    LinearCase,
    make_conv,
    make_linear,
    relative_error,
)
from emulator import load
from parity import _dense
from problems import EXTRA, Case

from sparse_kernels import ops, plan
from sparse_kernels.backends import _cuda_native, cuda

IDS = {
    "primes", "batch0", "batch1", "empty-blocks-relu", "no-bias", "even-b8x1", "b3-batch33",
    "groups3-blocks", "stride3-gaps", "batch0-blocks-stride", "conv-b16-stride-groups",
}  # fmt: skip
CASES = [c for c in (*LINEAR_CASES, *CONV_CASES, *EXTRA) if c.id in IDS and c.block[1] == 1]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CUDA backend serves CPU tensors; all memory is theirs to touch (torch allocates it)."""
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


def is_linear(case: Case) -> bool:
    return isinstance(case, LinearCase)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_autograd_on_the_backend_matches_float64(case: Case, emulated: None) -> None:
    make = make_linear if isinstance(case, LinearCase) else make_conv
    t = make(case, torch.float32, torch.Generator().manual_seed(3))  # type: ignore[arg-type]
    if case.relu:
        t["bias"] = torch.full((t["matrix"].shape[0],), 0.5)
        t["bias"][::2] = -0.5
    expected_y, expected_dx, expected_dw, *expected_db = _dense(case, t)
    x, values = t["x"].requires_grad_(), t["values"].requires_grad_()
    bias = None if t["bias"] is None else t["bias"].requires_grad_()
    if isinstance(case, ConvCase):
        y = ops.conv2d(x, values, *t["indices"], bias, geometry=case.geometry, relu=case.relu)
    else:
        y = ops.linear(
            x, values, *t["indices"], bias, out_features=case.out_features, relu=case.relu
        )
    y.backward(t["grad"])
    assert relative_error(y, expected_y) < 1e-5
    assert relative_error(x.grad, expected_dx) < 1e-5
    assert relative_error(values.grad, t["pattern"].compress(expected_dw)) < 1e-5
    if bias is not None:
        assert relative_error(bias.grad, expected_db[0]) < 1e-5


def test_blocks_that_have_no_kernel_are_refused_by_name() -> None:
    assert "got block (16, 32)" in str(
        cuda._why_not("linear", torch.float32, torch.zeros(1, 16, 32), None)
    )
    assert "got block (64, 1)" in str(cuda._why_not("linear_wgrad", torch.float32, None, (64, 1)))
    assert cuda._why_not("linear_wgrad", torch.float32, None, (32, 1)) is None
    assert "float64" in str(cuda._why_not("linear", torch.float64, None, None))
    assert "has kernels for linear," in str(cuda._why_not("dropout", torch.float32, None, None))
    x = torch.zeros(2, 4)
    index = [torch.zeros(2, dtype=torch.int32)] * 5
    with pytest.raises(ValueError, match=r"^linear_wgrad: the CUDA backend has kernels for blocks"):
        cuda.linear_wgrad(x, x, *index, 2, 2)


def test_a_cpu_tensor_is_not_for_this_backend() -> None:
    assert cuda.supports("linear", torch.zeros(1, 1)) == "serves CUDA tensors, got device cpu"
