"""backends/cuda.py for tensor-core blocks, from the autograd Functions down, with the emulated
module for the native one and CPU tensors for GPU tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import ConvCase, LinearCase, make_conv, make_linear, relative_error
from emulator import load
from mma_problems import CASES, Case
from parity import _dense

from sparse_kernels import ops, plan
from sparse_kernels.backends import _cuda_native, cuda

IDS = {
    "b16-narrow", "b16-batch0", "b32-parts", "b32-empty", "b16-conv-groups", "b32-conv-stride2",
}  # fmt: skip


@contextmanager
def precision(linear: str, conv: str) -> Iterator[None]:
    """torch's flags of float32 products ("ieee" or "tf32"), and what they were afterwards."""
    backends: Any = torch.backends  # its stubs lack cudnn.conv
    flags = (backends.cuda.matmul, backends.cudnn.conv)
    before = [flag.fp32_precision for flag in flags]
    try:
        for flag, value in zip(flags, (linear, conv), strict=True):
            flag.fp32_precision = value
        yield
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.fp32_precision = value


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CUDA backend serves CPU tensors, in TF32; torch allocates, so all memory is theirs."""
    module = load()
    monkeypatch.setattr(plan, "_cache", {})  # choices made here are not those of other tests
    monkeypatch.setattr(_cuda_native, "native", lambda: module)
    monkeypatch.setattr(_cuda_native, "place", lambda x: (0, 0))
    monkeypatch.setattr(cuda, "supports", lambda op, x, values=None, block=None: None)
    module.forget_memory()
    module.set_strict(False)
    try:
        with plan.use_backend("cuda"), precision("tf32", "tf32"):
            yield
    finally:
        module.set_strict(True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.id in IDS], ids=lambda c: c.id)
def test_autograd_on_the_backend_matches_float64(
    case: Case, dtype: torch.dtype, emulated: None
) -> None:
    make = make_linear if isinstance(case, LinearCase) else make_conv
    t = make(case, torch.float32, torch.Generator().manual_seed(3))  # type: ignore[arg-type]
    if case.relu:  # away from the kink: larger than any sum
        t["bias"] = torch.full((t["matrix"].shape[0],), 90.0)
        t["bias"][::2] = -90.0
    for name in ("x", "grad"):
        t[name] = t[name].to(dtype)
    expected_y, expected_dx, expected_dw, *expected_db = _dense(
        case, t | {name: t[name].float() for name in ("x", "grad")}
    )
    x, values = t["x"].requires_grad_(), t["values"].requires_grad_()
    bias = None if t["bias"] is None else t["bias"].requires_grad_()
    if isinstance(case, ConvCase):
        y = ops.conv2d(x, values, *t["indices"], bias, geometry=case.geometry, relu=case.relu)
    else:
        y = ops.linear(
            x, values, *t["indices"], bias, out_features=case.out_features, relu=case.relu
        )
    y.backward(t["grad"])
    limit = 2e-3 if dtype == torch.float32 else 1e-2
    layout = torch.channels_last if y.dim() == 4 else torch.contiguous_format
    assert y.is_contiguous(memory_format=layout)  # x.grad takes the strides of x
    for got, want in ((y, expected_y), (x.grad, expected_dx)):
        assert got.dtype == dtype
        assert want.numel() == 0 or relative_error(got, want) < limit
    assert values.grad.dtype == torch.float32
    assert relative_error(values.grad, t["pattern"].compress(expected_dw)) < limit
    if bias is not None:
        assert relative_error(bias.grad, expected_db[0]) < limit


def test_float32_blocks_are_served_only_where_torch_allows_tf32() -> None:
    block, index = torch.zeros(1, 16, 16), [torch.zeros(2, dtype=torch.int32)] * 5
    with precision("ieee", "tf32"):
        assert "in TF32" in str(cuda._why_not("linear", torch.float32, block, None))
        assert "cuda.matmul" in str(cuda._why_not("linear_wgrad", torch.float32, None, (32, 32)))
        assert cuda._why_not("linear", torch.bfloat16, block, None) is None
        assert cuda._why_not("conv2d", torch.float32, block, None) is None
        with pytest.raises(ValueError, match=r"^linear: the CUDA backend multiplies float32"):
            cuda.linear(torch.zeros(2, 16), block, *index, None, 16, False)


def test_blocks_write_batch_major_and_vectors_do_not() -> None:
    assert cuda.writes_batch_major((16, 16))
    assert cuda.writes_batch_major((32, 32))
    assert not cuda.writes_batch_major((32, 1))
    assert not cuda.writes_batch_major((16, 32))
