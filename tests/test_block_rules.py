"""Sparse momentum with blocks against its definition: a block is pruned by mean |w|, grown by |M|.

The definition is written out over the dense matrix, block by block with slices: nothing here uses
the package's block arithmetic.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from sparse_kernels import SparseMomentum
from sparse_kernels.nn import SparseConv2d, SparseLinear
from sparse_kernels.training.blocks import BlockGrid

BETA = 0.9
BLOCKS = [(1, 1), (2, 1), (4, 1), (8, 1), (1, 16), (3, 5), (4, 4), (8, 8), (16, 16)]
LAYERS = ["linear", "conv", "grouped"]


def make(kind: str, block: tuple[int, int], density: float = 0.4):
    """A float64 layer of sides that blocks of BLOCKS do not divide, and an input."""
    generator = torch.Generator().manual_seed(1)
    options = {"density": density, "block": block, "generator": generator, "dtype": torch.float64}
    if kind == "linear":
        return SparseLinear(50, 37, **options), torch.randn(
            6, 50, generator=generator, dtype=torch.float64
        )
    groups, out, channels = (1, 23, 17) if kind == "conv" else (2, 38, 34)
    layer = SparseConv2d(channels, out, 2, groups=groups, **options)
    return layer, torch.randn(3, channels, 4, 4, generator=generator, dtype=torch.float64)


def slices(layer) -> list[tuple[slice, slice]]:
    """Rows and columns of every block in key order, clipped to the segments of the matrix."""
    (rows, cols), (bh, bw) = layer.matrix_shape, layer.block
    high, wide = rows // layer.row_parts, cols // layer.col_parts
    tall = [
        slice(p * high + i, p * high + min(i + bh, high))
        for p in range(layer.row_parts)
        for i in range(0, high, bh)
    ]
    broad = [
        slice(p * wide + j, p * wide + min(j + bw, wide))
        for p in range(layer.col_parts)
        for j in range(0, wide, bw)
    ]
    return [(r, c) for r in tall for c in broad]


def means(layer, matrix: Tensor) -> list[float]:
    return [float(matrix[r, c].abs().mean()) for r, c in slices(layer)]


def dense_gradient(layer, x: Tensor, target: Tensor) -> Tensor:
    """Gradient of the loss for the whole matrix, through torch's own dense layer."""
    twin = layer.to_dense()
    nn.functional.mse_loss(twin(x), target).backward()
    return layer.weight_to_matrix(twin.weight.grad)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("kind", LAYERS)
def test_an_update_prunes_and_grows_the_blocks_of_the_definition(kind, block) -> None:
    layer, x = make(kind, block)
    target = torch.randn_like(layer(x).detach())
    optimizer = torch.optim.SGD([layer.values, layer.bias], lr=0.3, momentum=BETA)
    masks = SparseMomentum(
        layer,
        optimizer,
        total_steps=8,
        update_every=3,
        redistribution="none",
        dense_above=1.0,
        signal="exact",
    )
    momentum = torch.zeros(layer.matrix_shape, dtype=torch.float64)
    new: set[int] = set()
    for step in range(1, 7):
        momentum = BETA * momentum + dense_gradient(layer, x, target)
        optimizer.zero_grad()
        nn.functional.mse_loss(layer(x), target).backward()
        optimizer.step()
        before, weight = layer.pattern.keys().tolist(), layer.dense_matrix().detach()
        rate = masks.config.decayed_rate(step)
        record = masks.step()
        if step % 3:
            assert record is None
            continue
        weights, signals = means(layer, weight), means(layer, momentum)
        lost = math.ceil(rate * len(before))
        kept = sorted(before, key=lambda key: weights[key])[lost:]
        free = [key for key in range(len(weights)) if key not in set(kept)]
        grown = sorted(free, key=lambda key: -signals[key])[:lost]
        assert record is not None and record.removed == lost > 0
        assert layer.pattern.keys().tolist() == sorted(kept + grown)
        new |= set(grown) - set(before)
        # Survivors and blocks pruned and grown at once keep their weights; others start at zero.
        expected, state = torch.zeros_like(weight), torch.zeros_like(weight)
        for key in kept + grown:
            r, c = slices(layer)[key]
            state[r, c] = momentum[r, c]
            expected[r, c] = weight[r, c]
        assert torch.equal(layer.dense_matrix().detach(), expected)
        buffer = optimizer.state[layer.values]["momentum_buffer"]
        torch.testing.assert_close(layer.pattern.expand(buffer), state)
    assert new, "updates that grow nothing new show nothing"


@pytest.mark.parametrize("block", [(2, 1), (4, 4), (16, 16)])
def test_redistribution_weighs_layers_by_the_mean_over_their_elements(block) -> None:
    """Two layers of one block shape, one of them all partial blocks: importance counts elements."""
    generator = torch.Generator().manual_seed(0)
    options = {"block": block, "density": 0.5, "dtype": torch.float64, "generator": generator}
    model = nn.Sequential(
        SparseLinear(33, 17, **options), nn.Tanh(), SparseLinear(17, 40, **options)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=BETA)
    masks = SparseMomentum(
        model, optimizer, total_steps=4, update_every=2, dense_above=1.0, signal="exact"
    )
    x = torch.randn(5, 33, generator=generator, dtype=torch.float64)
    total = sum(layer.pattern.nnzb for layer in (model[0], model[2]))
    for _ in range(2):
        optimizer.zero_grad()
        (model(x) ** 2).sum().backward()
        optimizer.step()
        importance = []
        for layer in (model[0], model[2]):
            buffer = optimizer.state[layer.values]["momentum_buffer"]
            inside = layer.pattern.mask()
            importance.append(float(layer.pattern.expand(buffer)[inside].abs().mean()))
        before = [layer.pattern.nnzb for layer in (model[0], model[2])]
        record = masks.step()
    assert record is not None
    after = [layer.pattern.nnzb for layer in (model[0], model[2])]
    assert sum(after) == total
    lost = [math.ceil(masks.config.decayed_rate(2) * n) for n in before]
    grown = [a - b + gone for a, b, gone in zip(after, before, lost, strict=True)]
    share = importance[0] / sum(importance) * record.removed
    free = [
        layer.pattern.block_rows * layer.pattern.block_cols - b + gone
        for layer, b, gone in zip((model[0], model[2]), before, lost, strict=True)
    ]
    caps = [math.floor(0.99 * f) for f in free]
    # The nearest whole number to the share that the layers have room for.
    wanted = min(max(share, record.removed - caps[1]), caps[0])
    assert abs(grown[0] - wanted) < 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_means_of_sixteen_bit_blocks_are_summed_in_float32(dtype) -> None:
    """bfloat16 sums of 256 numbers lose the difference of two blocks."""
    grid = BlockGrid(16, 32, 16, 16, 1, 1)
    blocks = torch.ones(2, 16, 16, dtype=dtype)
    blocks[1, 0, 0] = 1.5
    got = grid.means(blocks)
    assert got.dtype == torch.float32 and got.tolist() == [1.0, 1.0 + 0.5 / 256]
