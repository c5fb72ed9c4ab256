"""Block arithmetic behind SparsityPattern: grids, index construction, dense <-> blocks."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _pattern_checks as checks
from ._pattern_checks import PatternError

_INDEX_NAMES = ("crow_indices", "col_indices", "t_crow", "t_row", "t_perm")


class BlockGrid(NamedTuple):
    """The grid of (bh, bw) blocks laid over a matrix [rows, cols] cut into row_parts x col_parts
    segments.

    No block spans two segments; the last block of a segment is clipped at its end.
    """

    rows: int
    cols: int
    bh: int
    bw: int
    row_parts: int
    col_parts: int

    @property
    def seg_rows(self) -> int:
        return self.rows // self.row_parts

    @property
    def seg_cols(self) -> int:
        return self.cols // self.col_parts

    @property
    def blocks_per_row_part(self) -> int:
        return -(-self.seg_rows // self.bh)

    @property
    def blocks_per_col_part(self) -> int:
        return -(-self.seg_cols // self.bw)

    @property
    def block_rows(self) -> int:
        return self.row_parts * self.blocks_per_row_part

    @property
    def block_cols(self) -> int:
        return self.col_parts * self.blocks_per_col_part

    @property
    def blocks(self) -> int:
        return self.block_rows * self.block_cols

    @property
    def has_partial_blocks(self) -> bool:
        return self.seg_rows % self.bh != 0 or self.seg_cols % self.bw != 0

    def heights(self, device: torch.device) -> Tensor:
        """Matrix rows inside each block row, int64 [block_rows]."""
        return _extents(self.row_parts, self.blocks_per_row_part, self.seg_rows, self.bh, device)

    def widths(self, device: torch.device) -> Tensor:
        """Matrix columns inside each block column, int64 [block_cols]."""
        return _extents(self.col_parts, self.blocks_per_col_part, self.seg_cols, self.bw, device)


def _extents(parts: int, per_part: int, segment: int, side: int, device: torch.device) -> Tensor:
    starts = torch.arange(per_part, device=device) * side
    return (segment - starts).clamp_(max=side).repeat(parts)


def rows_of(crow: Tensor, nnzb: int) -> Tensor:
    """Block row of each stored block, int64 [nnzb], from row pointers `crow` [block_rows + 1]."""
    counts = (crow[1:] - crow[:-1]).long()
    return torch.repeat_interleave(
        torch.arange(counts.numel(), device=crow.device), counts, output_size=nnzb
    )


def pointers(sorted_segments: Tensor, segments: int) -> Tensor:
    """Pointers int32 [segments + 1] into the sorted segment numbers of the entries.

    A binary search rather than a histogram: deterministic and free of host synchronisation on a
    GPU.
    """
    edges = torch.arange(segments + 1, device=sorted_segments.device, dtype=sorted_segments.dtype)
    return torch.searchsorted(sorted_segments.contiguous(), edges, out_int32=True)


class Index(NamedTuple):
    """The five int32 index arrays of SparsityPattern, without spare capacity."""

    crow: Tensor
    col: Tensor
    t_crow: Tensor
    t_row: Tensor
    t_perm: Tensor


def build_index(keys: Tensor, grid: BlockGrid) -> Index:
    """Both orders of sorted int64 `keys` [nnzb]; the transposed one by a stable column sort."""
    block_row = torch.div(keys, grid.block_cols, rounding_mode="floor")
    block_col = keys - block_row * grid.block_cols
    sorted_col, perm = torch.sort(block_col, stable=True)
    return Index(
        pointers(block_row, grid.block_rows),
        block_col.to(torch.int32),
        pointers(sorted_col, grid.block_cols),
        block_row[perm].to(torch.int32),
        perm.to(torch.int32),
    )


def to_blocks(dense: Tensor, grid: BlockGrid) -> Tensor:
    """Matrix [rows, cols] as [block_rows, bh, block_cols, bw], zero (False) outside of the matrix.

    A view where no block is partial and `dense` is contiguous, else a padded copy.
    """
    if grid.has_partial_blocks:
        tall, wide = grid.blocks_per_row_part * grid.bh, grid.blocks_per_col_part * grid.bw
        padded = dense.new_zeros(grid.row_parts, tall, grid.col_parts, wide)
        padded[:, : grid.seg_rows, :, : grid.seg_cols] = dense.reshape(
            grid.row_parts, grid.seg_rows, grid.col_parts, grid.seg_cols
        )
        dense = padded
    return dense.reshape(grid.block_rows, grid.bh, grid.block_cols, grid.bw)


def from_blocks(blocks: Tensor, grid: BlockGrid) -> Tensor:
    """Inverse of to_blocks: [block_rows, bh, block_cols, bw] clipped to the matrix [rows, cols]."""
    if grid.has_partial_blocks:
        tall, wide = grid.blocks_per_row_part * grid.bh, grid.blocks_per_col_part * grid.bw
        blocks = blocks.reshape(grid.row_parts, tall, grid.col_parts, wide)
        blocks = blocks[:, : grid.seg_rows, :, : grid.seg_cols]
    return blocks.reshape(grid.rows, grid.cols)


def gather(dense: Tensor, crow: Tensor, col: Tensor, nnzb: int, grid: BlockGrid) -> Tensor:
    """Values [capacity, bh, bw] of a matrix at a pattern; zero tail, zero outside of the matrix."""
    values = dense.new_zeros(col.numel(), grid.bh, grid.bw)
    block_row, block_col = rows_of(crow, nnzb), col[:nnzb].long()
    values[:nnzb] = to_blocks(dense, grid)[block_row, :, block_col, :]
    return values


def scatter(values: Tensor, crow: Tensor, col: Tensor, nnzb: int, grid: BlockGrid) -> Tensor:
    """Matrix [rows, cols] of values [>= nnzb, bh, bw]; entries outside of it are dropped."""
    blocks = values.new_zeros(grid.block_rows, grid.bh, grid.block_cols, grid.bw)
    blocks[rows_of(crow, nnzb), :, col[:nnzb].long(), :] = values[:nnzb]
    return from_blocks(blocks, grid)


def draw_keys(grid: BlockGrid, nnzb: int, generator: torch.Generator | None) -> Tensor:
    """`nnzb` distinct keys, sorted int64, uniform over all subsets of that size.

    Draws as many positions as are missing and marks them, until none is missing: never too many,
    and by symmetry under relabelling every subset is equally likely. Above half the blocks the
    gaps are drawn, so a round keeps at most about half of its draws missing. Holds one bool per
    block, no permutation, and draws in pieces of at most a million.
    """
    device = generator.device if generator is not None else torch.device("cpu")
    invert = nnzb > grid.blocks // 2
    wanted = grid.blocks - nnzb if invert else nnzb
    marked = torch.zeros(grid.blocks, dtype=torch.bool, device=device)
    missing = wanted
    while missing > 0:
        draws = (min(missing, 1 << 20),)
        marked[torch.randint(grid.blocks, draws, generator=generator, device=device)] = True
        missing = wanted - int(torch.count_nonzero(marked))
    if invert:
        marked.logical_not_()
    return marked.nonzero().flatten()


def make_grid(shape: Any, block: Any, row_parts: Any, col_parts: Any) -> BlockGrid:
    """Checked BlockGrid; TypeError or ValueError names the wrong argument."""
    rows, cols = checks.check_pair("shape", shape)
    bh, bw = checks.check_pair("block", block)
    grid = BlockGrid(
        rows,
        cols,
        bh,
        bw,
        checks.check_int("row_parts", row_parts, 1),
        checks.check_int("col_parts", col_parts, 1),
    )
    axes = (
        ("rows", rows, grid.row_parts, bh, "row_parts"),
        ("cols", cols, grid.col_parts, bw, "col_parts"),
    )
    for axis, (name, size, parts, side, part_name) in enumerate(axes):
        if size % parts != 0:
            raise ValueError(
                f"{part_name}: expected a divisor of {name} = {size}, got {parts}; parts are equal"
            )
        if side > size // parts:
            raise ValueError(
                f"block[{axis}]: expected at most {size // parts} ({name} {size} / {parts} parts), "
                f"got {side}; choose a smaller block"
            )
    return grid


def keys_of_csr(crow: Tensor, col: Tensor, grid: BlockGrid) -> Tensor:
    """Keys of checked block CSR arrays; PatternError names the first wrong position."""
    crow, col = (
        checks.check_integers("crow_indices", crow),
        checks.check_integers("col_indices", col),
    )
    if crow.device != col.device:
        raise PatternError(f"col_indices: expected device {crow.device}, got {col.device}")
    checks.check_crow("crow_indices", crow, grid.block_rows, col.numel())
    nnzb = int(crow[-1])
    block_row = rows_of(crow, nnzb)
    checks.check_columns("col_indices", block_row, col[:nnzb], grid.block_cols)
    return block_row * grid.block_cols + col[:nnzb]


def blocks_wanted(density: float | None, nnzb: int | None, blocks: int) -> int:
    """`nnzb`, or round(density * blocks), at least 1 when density > 0; one of them is given."""
    if (density is None) == (nnzb is None):
        raise ValueError(
            f"random: expected exactly one of density and nnzb, got density={density}, nnzb={nnzb}"
        )
    if density is None:
        return checks.check_int("nnzb", nnzb, 0, min(blocks, checks.INT32_MAX))
    if not isinstance(density, (int, float)) or isinstance(density, bool):
        raise TypeError(f"density: expected a number from 0 to 1, got {density!r}; pass a float")
    if not 0 <= density <= 1:  # also refuses NaN
        raise ValueError(f"density: expected 0 to 1, got {density}; it is a fraction, not per cent")
    count = max(round(density * blocks), 1 if density > 0 else 0)
    return checks.check_int("density * blocks", count, 0)


def validate(arrays: tuple[Tensor, ...], grid: BlockGrid) -> None:
    """Check the five index arrays; PatternError names the first wrong array and position."""
    named = dict(zip(_INDEX_NAMES, arrays, strict=True))
    checks.check_index_tensors(named)
    keys = keys_of_csr(named["crow_indices"], named["col_indices"], grid)
    for (name, got), want in zip(named.items(), build_index(keys, grid), strict=True):
        length = want.numel()
        if name not in ("crow_indices", "t_crow"):
            at = checks.first_index(got[length:] != 0)
            if at is not None:
                raise PatternError(
                    f"{name}[{length + at}]: expected 0 past the {length} stored blocks, "
                    f"got {int(got[length + at])}; clear the tail"
                )
            got = got[:length]
        why = "the transposed index does not belong to crow_indices and col_indices; rebuild it"
        checks.check_equal(name, got, want, why)
