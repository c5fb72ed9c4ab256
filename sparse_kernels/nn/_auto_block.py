"""block="auto": the largest block that a layer can be given without wasting it.

The idea of the bound: a block row with few blocks chooses its inputs coarsely, and the product's
start and end (and the load balance on a GPU) cost more than the blocks themselves.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

Sides = tuple[int, int]
Block = int | Sides | Literal["auto"]

#: Blocks that a block row must hold on average at the layer's density.
PER_BLOCK_ROW = 8
#: Tiles of the tensor cores, largest first.
GPU_BLOCKS: tuple[Sides, ...] = ((64, 64), (32, 32), (16, 16))
#: Vectors of output rows that are faster than the next smaller ones, largest first; (8, 1) and
#: (16, 1) are as fast as (4, 1) only, and coarser (docs/kernel-log.md, "block="auto"").
CPU_BLOCKS: tuple[Sides, ...] = ((4, 1), (2, 1))
#: On a GPU partial blocks may cover at most this share more than the segment itself.
GPU_PADDING = 0.125


def auto_block(device: str, segment: Sides, col_parts: int, density: float) -> Sides:
    """The block that ``sparsify(block="auto")`` gives a layer; (1, 1) where no larger one fits.

    Args:
        device: type of the layer's device, "cuda" or another.
        segment: (rows, columns) of one group and kernel position, which a block must fit.
        col_parts: kernel positions (taps) side by side in the matrix.
        density: fraction of the blocks that are kept, in (0, 1].

    The largest candidate that

    - leaves at least 8 blocks per block row: density * col_parts * ceil(columns / bw) >= 8;
    - divides the segment well.  On a GPU, where a product costs a whole block however little of it
      lies in the matrix: the blocks laid over the segment cover at most an eighth more than it.
      On the CPU: the height divides the rows, since only whole columns have kernels of their own.
    """
    gpu = device == "cuda"
    for block in GPU_BLOCKS if gpu else CPU_BLOCKS:
        per_row = density * col_parts * -(-segment[1] // block[1])
        # A millionth: 0.1 * 80 is 8 blocks, whatever the rounding of 0.1.
        if per_row >= PER_BLOCK_ROW * (1 - 1e-6) and _divides_well(segment, block, gpu):
            return block
    return 1, 1


def _divides_well(segment: Sides, block: Sides, gpu: bool) -> bool:
    rows, cols = segment
    if block[0] > rows or block[1] > cols:
        return False
    if not gpu:
        return rows % block[0] == 0 and cols % block[1] == 0
    covered = -(-rows // block[0]) * block[0] * -(-cols // block[1]) * block[1]
    return covered <= (1 + GPU_PADDING) * rows * cols


def block_of(
    module: nn.Linear | nn.Conv2d, segment: Sides, block: Block, density: float
) -> int | Sides:
    """``block``, or for "auto" the one that suits ``module`` at ``density`` (see auto_block)."""
    if block != "auto":
        return block
    taps = 1 if isinstance(module, nn.Linear) else module.kernel_size[0] * module.kernel_size[1]
    return auto_block(module.weight.device.type, segment, taps, density)
