"""What all launchers do on the host: no look at the device's data, grids from shapes alone.

Tensors of device "meta" have no data: a launcher that read some would raise. Needs triton (kernels
are imported, not run), no GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparse_kernels.backends import triton as backend
from sparse_kernels.geometry import Conv2dGeometry

pytestmark = pytest.mark.skipif(not backend.installed(), reason="triton is not installed")

BLOCK = (32, 16)
#: A block for the tensor cores, and the two of the plain cores.
BLOCKS = (BLOCK, (4, 1), (1, 1))
CAPACITY = 40
GEOMETRIES = {
    "plain": Conv2dGeometry(64, 96, 1, 1),
    "3x3": Conv2dGeometry(64, 96, 3, 3, 1, 1, 1, 1, 1, 1),
    "stride-groups": Conv2dGeometry(64, 96, 3, 3, 2, 2, 1, 1, 1, 1, groups=2),
}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Launches are recorded instead of run."""
    from sparse_kernels.backends.triton import operands

    recorded: list[Any] = []
    monkeypatch.setattr(operands.Launch, "run", lambda self: recorded.append(self))
    return recorded


def index_of(
    g: Conv2dGeometry, capacity: int = CAPACITY, block: tuple[int, int] = BLOCK
) -> tuple[torch.Tensor, ...]:
    """The five index tensors of a pattern, without contents."""
    rows = g.groups * -(-(g.out_channels // g.groups) // block[0])
    cols = g.taps * -(-(g.in_channels // g.groups) // block[1])
    lengths = (rows + 1, capacity, cols + 1, capacity, capacity)
    return tuple(torch.empty(n, dtype=torch.int32, device="meta") for n in lengths)


def call_all(
    g: Conv2dGeometry,
    capacity: int = CAPACITY,
    batch: int = 4,
    block: tuple[int, int] = BLOCK,
) -> list[torch.Tensor]:
    """Forward and both gradients of a convolution, on tensors without data."""
    index = index_of(g, capacity, block)
    values = torch.empty(capacity, *block, device="meta")
    x = torch.empty(batch, g.in_channels, 9, 7, dtype=torch.bfloat16, device="meta")
    grad = torch.empty(
        batch, g.out_channels, *g.output_size(9, 7), dtype=torch.bfloat16, device="meta"
    )
    bias = torch.empty(g.out_channels, device="meta")
    return [
        backend.conv2d(x, values, *index, bias, list(g), True),
        backend.conv2d_dgrad(grad, values, *index, 9, 7, list(g)),
        backend.conv2d_wgrad(grad, x, *index, *block, list(g)),
    ]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("g", GEOMETRIES.values(), ids=GEOMETRIES)
def test_a_convolution_reads_nothing_on_the_host(
    g: Conv2dGeometry, block: tuple[int, int], launches: list[Any]
) -> None:
    y, dx, dv = call_all(g, block=block)
    assert (y.dtype, dx.dtype, dv.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    kernels = [launch.kernel.__name__ for launch in launches]
    if block[1] == 1:
        assert kernels == ["vector_product", "vector_dgrad", "vector_wgrad"]
    else:
        lists = [] if g is GEOMETRIES["plain"] else ["column_lists"]
        assert kernels == ["block_product", *lists, "block_product", "block_wgrad"]


@pytest.mark.parametrize("block", [*BLOCKS, (16, 1)], ids=str)
def test_a_linear_layer_reads_nothing_on_the_host(
    block: tuple[int, int], launches: list[Any]
) -> None:
    g = Conv2dGeometry(64, 96, 1, 1)
    index = index_of(g, block=block)
    values = torch.empty(CAPACITY, *block, device="meta")
    x = torch.empty(5, 96, dtype=torch.bfloat16, device="meta")
    grad = torch.empty(5, 64, dtype=torch.bfloat16, device="meta")
    assert backend.linear(x, values, *index, None, 64, False).shape == (5, 64)
    assert backend.linear_dgrad(grad, values, *index, 96).shape == (5, 96)
    assert backend.linear_wgrad(grad, x, *index, *block).shape == (CAPACITY, *block)
    kernels = ["vector_product", "vector_dgrad", "vector_wgrad"]
    if block == (16, 1):
        kernels[0] = "vector_gather"  # half a tile of the tensor cores and more
    elif block == BLOCK:
        kernels = ["block_product", "block_product", "block_wgrad"]
    assert [launch.kernel.__name__ for launch in launches] == kernels


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_an_empty_batch_launches_nothing(block: tuple[int, int], launches: list[Any]) -> None:
    y, dx, dv = call_all(GEOMETRIES["3x3"], batch=0, block=block)
    assert (y.shape[0], dx.shape[0], tuple(dv.shape)) == (0, 0, (CAPACITY, *block))
    assert launches == []


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_large_weight_gradient_is_split_and_summed(
    block: tuple[int, int], launches: list[Any]
) -> None:
    g = GEOMETRIES["3x3"]
    call_all(g, batch=512, block=block)
    wgrad, sums = launches[-2:]
    kind = "vector_wgrad" if block[1] == 1 else "block_wgrad"
    assert (wgrad.kernel.__name__, sums.kernel.__name__) == (kind, "sum_parts")
    parts, tile = wgrad.grid[1], wgrad.arguments["TILE_M"]
    assert parts == sums.arguments["PARTS"] > 1
    # Every point has its part, and no part is past the end.
    assert parts * wgrad.arguments["steps"] * tile >= 512 * 9 * 7
    assert (parts - 1) * wgrad.arguments["steps"] * tile < 512 * 9 * 7


def test_a_block_that_is_not_served_is_refused() -> None:
    g = Conv2dGeometry(64, 96, 1, 1)
    index, x = index_of(g), torch.empty(5, 96, device="meta")
    with pytest.raises(ValueError, match=r"linear: .*16 to 128 .*got \(8, 16\)"):
        backend.linear(x, torch.empty(CAPACITY, 8, 16, device="meta"), *index, None, 64, False)
    with pytest.raises(ValueError, match=r"linear_wgrad: .*up to 32, got \(64, 1\)"):
        backend.linear_wgrad(torch.empty(5, 64, device="meta"), x, *index, 64, 1)


def test_a_captured_order_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """During a capture a stale order is used as it is, and one made then is not kept."""
    from sparse_kernels.backends.triton import operands

    pointer = torch.tensor([0, 1, 3], dtype=torch.int32)
    order = operands.row_order(pointer, "capture", pointer.diff)
    assert order.tolist() == [1, 0]
    monkeypatch.setattr(operands, "_capturing", lambda tensor: True)
    pointer.copy_(torch.tensor([0, 2, 3]))
    assert operands.row_order(pointer, "capture", pointer.diff) is order
    assert order.tolist() == [1, 0], "the graph would record the sort"
    made = operands.row_order(pointer, "other", pointer.diff)
    assert made is not operands.row_order(pointer, "other", pointer.diff), "memory of the graph"
    monkeypatch.setattr(operands, "_capturing", lambda tensor: False)
    assert operands.row_order(pointer, "capture", pointer.diff) is order
    assert order.tolist() == [0, 1], "brought up to date in the memory that the graph reads"
