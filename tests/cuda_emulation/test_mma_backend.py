"""backends/cuda.py for tensor-core blocks, from the autograd Functions down, with the emulated
module for the native one and CPU tensors for GPU tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from backend_support import serving_cpu_tensors, step
from cases import LinearCase, make_conv, make_linear, relative_error
from mma_problems import CASES, Case
from parity import _dense

from sparse_kernels.backends import cuda

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
    """The CUDA backend serves CPU tensors, in TF32."""
    with serving_cpu_tensors(monkeypatch), precision("tf32", "tf32"):
        yield


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
    y, x, values, bias = step(case, t)
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
