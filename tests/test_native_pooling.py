"""The native pooling kernels against torch in float64, per instruction set.

Activations are tensors of shape [C, H, W, N], contiguous: what feature-major memory looks like.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from native_support import address, error
from torch import Tensor
from torch.nn import functional as F

from sparse_kernels import _load
from sparse_kernels.geometry import pool_output_size

_native = _load.native()
ISAS = _native.supported_isas()
# Relative to the largest value; sums are short or kept in double.
TOLERANCE = 1e-5


@pytest.fixture(params=ISAS, autouse=True)
def native(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The module, using one instruction set after the other."""
    before = _native.isa()
    _native.set_isa(request.param)
    yield _native
    _native.set_isa(before)


class PoolCase(NamedTuple):
    id: str
    batch: int
    channels: int
    height: int
    width: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False

    def out(self) -> tuple[int, int]:
        return pool_output_size(
            (self.height, self.width),
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
        )

    def dims(self) -> list[int]:
        sizes = [self.batch, self.channels, self.height, self.width, *self.out()]
        return [*sizes, *self.kernel, *self.stride, *self.padding, *self.dilation]


POOL_CASES = [
    PoolCase("vgg", 128, 3, 8, 8, (2, 2), (2, 2)),
    PoolCase("odd", 67, 2, 7, 9, (2, 2), (2, 2), ceil_mode=True),
    PoolCase("overlap", 5, 3, 11, 6, (3, 3), (2, 2), (1, 1)),
    PoolCase("oblong", 1, 2, 9, 13, (3, 5), (1, 3), (1, 2), ceil_mode=True),
    PoolCase("gaps", 33, 1, 10, 10, (2, 2), (3, 4)),
    PoolCase("whole image", 70, 4, 5, 6, (5, 6), (1, 1)),
    PoolCase("no batch", 0, 3, 4, 4, (2, 2), (2, 2)),
]
DILATED = [
    PoolCase("dilated", 17, 2, 12, 11, (3, 2), (2, 1), (1, 1), (2, 3)),
    PoolCase("dilated ceil", 65, 1, 13, 9, (3, 3), (2, 2), (1, 0), (3, 2), ceil_mode=True),
]


def pool_input(case: PoolCase) -> tuple[Tensor, Tensor]:
    """x [C, H, W, N] without ties, and a gradient [C, OH, OW, N]."""
    shape = (case.channels, case.height, case.width, case.batch)
    size = int(torch.tensor(shape).prod())
    x = (torch.randperm(size).float() / max(size, 1) - 0.5).reshape(shape)
    return x, torch.randn(case.channels, *case.out(), case.batch)


def torch_order(x: Tensor) -> Tensor:
    return x.double().permute(3, 0, 1, 2)


def max_pool(native: Any, case: PoolCase, x: Tensor, threads: int = 2) -> tuple[Tensor, Tensor]:
    y = torch.empty(case.channels, *case.out(), case.batch)
    argmax = torch.empty(y.shape, dtype=torch.uint8)
    native.max_pool2d(address(y), address(argmax), address(x), case.dims(), threads)
    return y, argmax


def max_pool_backward(
    native: Any, case: PoolCase, grad: Tensor, argmax: Tensor, threads: int = 2
) -> Tensor:
    dx = torch.empty(case.channels, case.height, case.width, case.batch)
    native.max_pool2d_backward(address(dx), address(grad), address(argmax), case.dims(), threads)
    return dx


@pytest.mark.parametrize("case", [*POOL_CASES, *DILATED], ids=lambda c: c.id)
def test_max_pool(native: Any, case: PoolCase) -> None:
    x, grad = pool_input(case)
    y, argmax = max_pool(native, case, x)
    leaf = torch_order(x).requires_grad_()
    want = F.max_pool2d(leaf, case.kernel, case.stride, case.padding, case.dilation, case.ceil_mode)
    want.backward(torch_order(grad))
    assert torch.equal(torch_order(y), want)
    assert leaf.grad is not None
    assert error(torch_order(max_pool_backward(native, case, grad, argmax)), leaf.grad) <= TOLERANCE
    assert bool((argmax < case.kernel[0] * case.kernel[1]).all())


def test_max_pool_nan_infinity_and_ties(native: Any) -> None:
    """torch's choices: NaN wins, of equal values the first, and -inf is a value like others."""
    case = PoolCase("special", 66, 1, 4, 6, (2, 3), (2, 3))
    x = torch.zeros(1, 4, 6, 66)
    x[0, :2, :3] = float("-inf")
    x[0, 1, 4] = float("nan")
    x[0, 0, 4] = float("inf")
    x[0, 3, 1], x[0, 2, 2] = 7.0, 7.0
    y, argmax = max_pool(native, case, x)
    want, index = F.max_pool2d(torch_order(x), (2, 3), return_indices=True)
    assert torch.equal(torch_order(y).nan_to_num(99.0), want.nan_to_num(99.0))
    first = torch.tensor([[0, 3], [12, 15]])  # the windows' first pixels
    taps = torch.tensor([[0, 0], [0, 0]]) + index[0, 0] - first
    assert torch.equal(argmax[0, :, :, 0].long(), taps // 6 * 3 + taps % 6)
    assert argmax[0, :, :, 0].tolist() == [[0, 4], [2, 0]]


def test_max_pool_of_a_window_without_taps(native: Any) -> None:
    """Taps at rows -1 and 1 of an image of one row: -inf, and no gradient anywhere."""
    case = PoolCase("nothing", 3, 1, 1, 1, (2, 1), (1, 1), (1, 0), (2, 1))
    assert case.out() == (1, 1)
    y, argmax = max_pool(native, case, torch.ones(1, 1, 1, 3))
    assert bool((y == float("-inf")).all()) and bool((argmax == 255).all())
    assert not max_pool_backward(native, case, torch.ones(1, 1, 1, 3), argmax).any()


@pytest.mark.parametrize("divisor", [0, 3])
@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("case", POOL_CASES, ids=lambda c: c.id)
def test_avg_pool(native: Any, case: PoolCase, include: bool, divisor: int) -> None:
    x, grad = pool_input(case)
    y, dx = torch.empty_like(grad), torch.empty_like(x)
    native.avg_pool2d(address(y), address(x), case.dims(), include, divisor, 2)
    native.avg_pool2d_backward(address(dx), address(grad), case.dims(), include, divisor, 2)
    leaf = torch_order(x).requires_grad_()
    window = (case.kernel, case.stride, case.padding, case.ceil_mode, include, divisor or None)
    want = F.avg_pool2d(leaf, *window)
    want.backward(torch_order(grad))
    assert leaf.grad is not None
    assert error(torch_order(y), want.detach()) <= TOLERANCE
    assert error(torch_order(dx), leaf.grad) <= TOLERANCE


@pytest.mark.parametrize("case", [POOL_CASES[2], POOL_CASES[3]], ids=lambda c: c.id)
def test_pooling_does_not_depend_on_threads(native: Any, case: PoolCase) -> None:
    x, grad = pool_input(case)
    results = []
    for threads in (1, 2, 5):
        y, argmax = max_pool(native, case, x, threads)
        mean, dmean = torch.empty_like(y), torch.empty_like(x)
        native.avg_pool2d(address(mean), address(x), case.dims(), True, 0, threads)
        native.avg_pool2d_backward(address(dmean), address(grad), case.dims(), True, 0, threads)
        back = max_pool_backward(native, case, grad, argmax, threads)
        results.append([y, argmax, back, mean, dmean])
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)
