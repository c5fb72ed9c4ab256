"""The blocks of a weight matrix as one list: block key = block_row * block_cols + block_col.

The geometry is the pattern's (sparse_kernels/pattern.py): no block spans two row parts (groups) or
two column parts (kernel taps), and a last block that sticks out of its segment is zero outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor


def _extents(parts: int, segment: int, block: int, device: torch.device) -> Tensor:
    """Length of every block along one side, int64 [parts * ceil(segment / block)]."""
    starts = torch.arange(0, segment, block, device=device)
    return (segment - starts).clamp(max=block).repeat(parts)


@dataclass(frozen=True)
class BlockGrid:
    """All blocks, stored or not, of a [rows, cols] matrix with blocks [bh, bw]."""

    rows: int
    cols: int
    bh: int
    bw: int
    row_parts: int
    col_parts: int

    @classmethod
    def of(cls, layer: Any) -> BlockGrid:
        """Grid of a sparse layer (matrix_shape, block, row_parts, col_parts)."""
        (rows, cols), (bh, bw) = layer.matrix_shape, layer.block
        return cls(rows, cols, bh, bw, layer.row_parts, layer.col_parts)

    @property
    def block_rows(self) -> int:
        return self.row_parts * -(-(self.rows // self.row_parts) // self.bh)

    @property
    def block_cols(self) -> int:
        return self.col_parts * -(-(self.cols // self.col_parts) // self.bw)

    @property
    def blocks(self) -> int:
        """Number of blocks of the full matrix."""
        return self.block_rows * self.block_cols

    @property
    def partial(self) -> bool:
        """True if some block sticks out of the matrix (or of its segment)."""
        return bool(
            (self.rows // self.row_parts) % self.bh or (self.cols // self.col_parts) % self.bw
        )

    def counts(self, keys: Tensor) -> Tensor:
        """Matrix elements inside each block of `keys` (int64 [n]) -> int64 [n]."""
        if not self.partial:
            return torch.full_like(keys, self.bh * self.bw)
        heights = _extents(self.row_parts, self.rows // self.row_parts, self.bh, keys.device)
        widths = _extents(self.col_parts, self.cols // self.col_parts, self.bw, keys.device)
        block_row = torch.div(keys, self.block_cols, rounding_mode="floor")
        return heights[block_row] * widths[keys - block_row * self.block_cols]

    def to_blocks(self, matrix: Tensor) -> Tensor:
        """[rows, cols] -> [blocks, bh, bw] in key order, zero outside the matrix.

        Element blocks give a view, others a copy.
        """
        if (self.bh, self.bw) == (1, 1):
            return matrix.reshape(-1, 1, 1)
        seg_rows, seg_cols = self.rows // self.row_parts, self.cols // self.col_parts
        parts = matrix.reshape(self.row_parts, seg_rows, self.col_parts, seg_cols)
        if self.partial:
            below, right = -seg_rows % self.bh, -seg_cols % self.bw
            parts = functional.pad(parts, (0, right, 0, 0, 0, below))
        split = parts.reshape(
            self.row_parts, -1, self.bh, self.col_parts, parts.shape[3] // self.bw, self.bw
        )
        return split.permute(0, 1, 3, 4, 2, 5).reshape(-1, self.bh, self.bw)

    def means(self, blocks: Tensor) -> Tensor:
        """Mean absolute value per block over its elements inside the matrix: [blocks, bh, bw] ->
        [blocks].
        """
        if (self.bh, self.bw) == (1, 1):
            return blocks.reshape(-1).abs()
        keys = torch.arange(self.blocks, device=blocks.device)
        return blocks.abs().sum(dim=(1, 2)) / self.counts(keys)
