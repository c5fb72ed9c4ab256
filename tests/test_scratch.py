"""Native scratch is bounded by non-zeros and activations, never by rows x cols or im2col."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from sparse_kernels import ops
from sparse_kernels._load import native
from sparse_kernels.geometry import Conv2dGeometry
from sparse_kernels.pattern import SparsityPattern

THREADS = 2
NNZB = 20_000
FLOAT = 4


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def _bound(pattern: SparsityPattern, activation_bytes: int) -> int:
    """What csrc/kernels.h promises: lists per non-zero, offsets per row and tap, tiles."""
    elements = pattern.nnzb * pattern.block[0] * pattern.block[1]
    lists = 32 * elements + 32 * pattern.nnzb
    rows = 64 * pattern.col_parts * max(pattern.block_rows, pattern.block_cols)
    return lists + rows + THREADS * 2**19 + 3 * activation_bytes


def _peaks(forward: Callable[[], torch.Tensor]) -> Iterator[int]:
    native().release_scratch()
    y = forward()
    yield native().scratch_peak()
    native().release_scratch()
    y.backward(torch.ones_like(y))
    yield native().scratch_peak()
    native().release_scratch()


@pytest.mark.parametrize("block", [(1, 1), (4, 1)], ids=str)
def test_linear_scratch(block: tuple[int, int]) -> None:
    size, batch = 4096, 64
    nnzb = NNZB // block[0]
    pattern = SparsityPattern.random((size, size), nnzb=nnzb, block=block)
    values = torch.randn(pattern.capacity, *block, requires_grad=True)
    x = torch.randn(batch, size, requires_grad=True)
    bound = _bound(pattern, size * batch * FLOAT)
    assert bound < size * size * FLOAT / 4, "the bound would not notice a dense weight"
    peaks = list(
        _peaks(lambda: ops.linear(x, values, *pattern.tensors(), out_features=size, relu=True))
    )
    assert all(0 < peak <= bound for peak in peaks), (peaks, bound)


def test_conv_scratch() -> None:
    channels, batch, pixels = 1024, 16, 6
    geometry = Conv2dGeometry(channels, channels, 3, 3, 1, 1, 1, 1, 1, 1)
    pattern = SparsityPattern.random(geometry.matrix_shape, nnzb=NNZB, col_parts=9)
    values = torch.randn(pattern.capacity, 1, 1, requires_grad=True)
    x = torch.randn(batch, channels, pixels, pixels, requires_grad=True)
    activation = channels * batch * (pixels + 2) ** 2 * FLOAT
    bound = _bound(pattern, activation)
    assert bound < 9 * channels * batch * pixels**2 * FLOAT, "an im2col matrix would fit"
    assert bound < 9 * channels * channels * FLOAT, "a dense weight would fit"
    peaks = list(_peaks(lambda: ops.conv2d(x, values, *pattern.tensors(), geometry=geometry)))
    assert all(0 < peak <= bound for peak in peaks), (peaks, bound)


@pytest.mark.parametrize(
    ("channels", "pixels", "groups", "nnzb"),
    [(64, 64, 1, 64), (256, 28, 256, 256 * 4)],
    ids=["one element per row", "depthwise"],
)
def test_few_elements_do_not_pack_whole_images(
    channels: int, pixels: int, groups: int, nnzb: int
) -> None:
    """Little arithmetic must not buy large tiles: wgrad's fit the budget of kernels.h, and a
    product's stay below the packed image of one lane group.
    """
    batch = 16
    geometry = Conv2dGeometry(channels, channels, 3, 3, 1, 1, 1, 1, 1, 1, groups=groups)
    pattern = SparsityPattern.random(
        geometry.matrix_shape, nnzb=nnzb, row_parts=groups, col_parts=9
    )
    values = torch.randn(pattern.capacity, 1, 1, requires_grad=True)
    x = torch.randn(batch, channels, pixels, pixels)
    image = channels * batch * (pixels + 2) ** 2 * FLOAT
    forward, wgrad = _peaks(lambda: ops.conv2d(x, values, *pattern.tensors(), geometry=geometry))
    assert 0 < wgrad <= _bound(pattern, 0) < image / 4, (wgrad, _bound(pattern, 0), image)
    assert 0 < forward <= _bound(pattern, 0) + THREADS * 2**21 < image, (forward, image)


def test_released_scratch_is_gone() -> None:
    pattern = SparsityPattern.random((64, 64), density=0.1)
    values = torch.randn(pattern.capacity, 1, 1)
    ops.linear(torch.randn(8, 64), values, *pattern.tensors(), out_features=64)
    assert native().scratch_bytes() > 0
    native().release_scratch()
    assert native().scratch_bytes() == 0 and native().scratch_peak() == 0
