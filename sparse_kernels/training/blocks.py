"""The blocks of a weight matrix as one list: block key = block_row * block_cols + block_col.

The geometry is the pattern's (sparse_kernels/pattern.py); here every block counts, stored or not,
and the blocks lie one after another in key order, so that keys index them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_kernels import _pattern_index as index


class BlockGrid(index.BlockGrid):
    """All blocks of a [rows, cols] matrix with blocks [bh, bw]."""

    __slots__ = ()

    @classmethod
    def of(cls, layer: Any) -> BlockGrid:
        """Grid of a sparse layer (matrix_shape, block, row_parts, col_parts)."""
        (rows, cols), (bh, bw) = layer.matrix_shape, layer.block
        return cls(rows, cols, bh, bw, layer.row_parts, layer.col_parts)

    def counts(self, keys: Tensor) -> Tensor:
        """Matrix elements inside each block of `keys` (int64 [n]) -> int64 [n]."""
        if not self.has_partial_blocks:
            return torch.full_like(keys, self.bh * self.bw)
        block_row = torch.div(keys, self.block_cols, rounding_mode="floor")
        block_col = keys - block_row * self.block_cols
        return self.heights(keys.device)[block_row] * self.widths(keys.device)[block_col]

    def to_blocks(self, matrix: Tensor) -> Tensor:
        """[rows, cols] -> [blocks, bh, bw] in key order, zero outside the matrix.

        Element blocks give a view, others a copy.
        """
        if (self.bh, self.bw) == (1, 1):
            return matrix.reshape(-1, 1, 1)
        return index.to_blocks(matrix, self).transpose(1, 2).reshape(-1, self.bh, self.bw)

    def stored(self, matrix: Tensor, pattern: Any) -> Tensor:
        """[rows, cols] -> [nnzb, bh, bw] at the stored blocks of `pattern`."""
        if (self.bh, self.bw) == (1, 1):  # keys are places in the matrix: one gather
            return matrix.reshape(-1).index_select(0, pattern.keys()).view(-1, 1, 1)
        blocks: Tensor = pattern.compress(matrix)
        return blocks[: pattern.nnzb]

    def means(self, blocks: Tensor) -> Tensor:
        """Mean |.| per block over its elements inside the matrix: [blocks, bh, bw] -> [blocks].

        16-bit blocks are summed in float32 (and give it): in bfloat16 large blocks would tie.
        """
        if (self.bh, self.bw) == (1, 1):
            return blocks.reshape(-1).abs()
        magnitude = blocks.abs()
        if magnitude.dtype in (torch.float16, torch.bfloat16):
            magnitude = magnitude.float()
        keys = torch.arange(self.blocks, device=blocks.device)
        return magnitude.sum(dim=(1, 2)) / self.counts(keys)
