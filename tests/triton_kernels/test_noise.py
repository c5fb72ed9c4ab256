"""Dropout in Triton: the mask of every backend, word for word. Interpreted, or on a GPU."""

from __future__ import annotations

import pytest
import torch
from float64_parity import DEVICE
from interpreter_support import HOW, INTERPRETING

from sparse_kernels import ops, plan
from sparse_kernels.backends import reference
from sparse_kernels.backends import triton as backend
from sparse_kernels.layout import to_feature_major

pytestmark = [
    pytest.mark.skipif(not backend.installed(), reason="triton is not installed"),
    pytest.mark.skipif(not INTERPRETING and not torch.cuda.is_available(), reason=HOW),
    *([] if INTERPRETING else [pytest.mark.gpu]),
]
SEEDS = (0, 1, 2**63 - 1, -1, 0x1234_5678_9ABC_DEF0)
# Less than a block of 256, one more than that, and more than one program's 1024.
SHAPES = [(5,), (257,), (7, 300), (2, 3, 11, 13), (0, 4)]


def both(
    x: torch.Tensor, seed: int, p: float, stride: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    key = torch.tensor(seed)
    found = backend.dropout(x.to(DEVICE), key.to(DEVICE), p, stride)
    assert found.stride() == stride
    return found.cpu(), reference.dropout(x, key, p, stride)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_mask_is_the_definition_s(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    for seed in SEEDS:
        for p in (0.3, 0.999, 1.0):
            found, expected = both(x, seed, p, x.stride())
            assert torch.equal(found == 0, expected == 0)
            if dtype == torch.bfloat16 and INTERPRETING:  # which cuts what a GPU rounds
                torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
            else:
                assert torch.equal(found, expected)


def test_places_are_those_of_memory() -> None:
    """Feature-major and channels_last results, from inputs of any strides."""
    x = torch.randn(3, 5, 7, 6)
    wide = torch.zeros(3, 5, 7, 12)[..., ::2].copy_(x)
    orders = (to_feature_major(x), x.contiguous(memory_format=torch.channels_last))
    for ordered in orders:
        for source in (x, ordered, wide):
            found, expected = both(source, 7, 0.5, ordered.stride())
            assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's
def test_nan_and_infinity_are_multiplied() -> None:
    x = torch.full((600,), float("inf"))
    x[::2] = float("nan")
    found, expected = both(x, 3, 0.5, (1,))
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf()) and found.isinf().any()


def test_the_operator_and_its_gradient() -> None:
    x = torch.randn(9, 70, device=DEVICE, requires_grad=True)
    with plan.use_backend("triton"):
        y = ops.dropout(x, 0.4)
        y.sum().backward()
        args = (x.detach(), torch.tensor(5, device=DEVICE), 0.4, [1, 9])
        operator = torch.ops.sparse_kernels.dropout.default
        torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))
    assert x.grad is not None
    assert torch.equal(x.grad != 0, y != 0)
    torch.testing.assert_close(y, x * x.grad)
