"""SparsityPattern: where the non-zeros of a weight matrix are, and nothing else.

A matrix [rows, cols] is cut into row_parts x col_parts equal segments (groups and kernel taps of a
convolution), each segment into (bh, bw) blocks, clipped at the segment's end. Stored blocks are
listed in CSR order (`crow_indices`, `col_indices`) and, for products with the transpose, in CSC
order (`t_crow`, `t_row`, with `t_perm` pointing back into the values). Block (1, 1) is CSR as in
torch.sparse_csr; larger blocks are BSR.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _pattern_checks as checks
from . import _pattern_index as index
from ._pattern_checks import PatternError

__all__ = ["PatternError", "SparsityPattern"]

# Capacity factor of a rewrite that outgrows its tensors: few reallocations, little waste.
_GROWTH = 1.25


class SparsityPattern:
    """The stored blocks of a sparse matrix, in both orders, as int32 index tensors on one device.

    Attributes:
        shape, block: (rows, cols) of the matrix, (bh, bw) of a block.
        row_parts, col_parts: segments of rows (groups of a convolution) and columns (taps).
        block_rows, block_cols: size of the block grid.
        crow_indices: [block_rows + 1]; col_indices: [capacity], block columns, sorted in each row.
        t_crow: [block_cols + 1]; t_row: [capacity], block rows, sorted in each column.
        t_perm: [capacity], position in the values. Past nnzb these arrays hold 0.

    Build one with a class method: from_block_mask, from_mask, from_keys, from_csr, random, full,
    from_torch. `capacity` is the number of places for blocks (default: those stored, at least 1).
    Wrong arguments raise TypeError or ValueError, wrong index arrays PatternError (a ValueError).
    """

    def __init__(
        self,
        shape: tuple[int, int],
        block: tuple[int, int] = (1, 1),
        row_parts: int = 1,
        col_parts: int = 1,
        *,
        capacity: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        """An empty pattern (no block stored) with room for `capacity` blocks."""
        self._grid = index.make_grid(shape, block, row_parts, col_parts)
        self._allocate(checks.check_int("capacity", capacity, 1), device)
        self._nnzb: int | None = 0
        self._nnz: int | None = 0

    @classmethod
    def from_keys(
        cls,
        keys: Tensor,
        shape: tuple[int, int],
        block: tuple[int, int] = (1, 1),
        row_parts: int = 1,
        col_parts: int = 1,
        capacity: int | None = None,
    ) -> SparsityPattern:
        """Pattern of `keys` int64 [nnzb], increasing: block_row * block_cols + block_col."""
        checks.check_tensor("keys", keys, 1)
        places = max(1, keys.numel()) if capacity is None else capacity
        checks.check_int("keys.numel()", keys.numel(), 0)
        checks.check_int("capacity", places, max(1, keys.numel()))
        pattern = cls(shape, block, row_parts, col_parts, capacity=places, device=keys.device)
        pattern.rewrite_(keys)
        return pattern

    @classmethod
    def from_block_mask(
        cls,
        block_mask: Tensor,
        shape: tuple[int, int],
        block: tuple[int, int] = (1, 1),
        row_parts: int = 1,
        col_parts: int = 1,
        capacity: int | None = None,
    ) -> SparsityPattern:
        """Pattern that stores the blocks set in `block_mask`, bool [block_rows, block_cols]."""
        grid = index.make_grid(shape, block, row_parts, col_parts)
        checks.check_bool("block_mask", block_mask, (grid.block_rows, grid.block_cols))
        keys = block_mask.reshape(-1).nonzero().flatten()
        return cls.from_keys(keys, shape, block, row_parts, col_parts, capacity)

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        block: tuple[int, int] = (1, 1),
        row_parts: int = 1,
        col_parts: int = 1,
        capacity: int | None = None,
    ) -> SparsityPattern:
        """Pattern of every block with an element set in `mask`, bool [rows, cols]."""
        checks.check_tensor("mask", mask, 2)
        shape = (mask.shape[0], mask.shape[1])
        checks.check_bool("mask", mask, shape)
        grid = index.make_grid(shape, block, row_parts, col_parts)
        blocks = index.to_blocks(mask, grid).any(dim=3).any(dim=1)
        return cls.from_block_mask(blocks, shape, block, row_parts, col_parts, capacity)

    @classmethod
    def from_csr(
        cls,
        crow: Tensor,
        col: Tensor,
        shape: tuple[int, int],
        block: tuple[int, int] = (1, 1),
        row_parts: int = 1,
        col_parts: int = 1,
        capacity: int | None = None,
    ) -> SparsityPattern:
        """Pattern of row pointers [block_rows + 1], block columns [>= crow[-1]], any int dtype.

        They are checked and copied; entries of `col` past crow[-1] (spare capacity) are ignored.
        """
        grid = index.make_grid(shape, block, row_parts, col_parts)
        keys = index.keys_of_csr(crow, col, grid)
        return cls.from_keys(keys, shape, block, row_parts, col_parts, capacity)

    @classmethod
    def from_indices(
        cls,
        crow: Tensor,
        col: Tensor,
        t_crow: Tensor,
        t_row: Tensor,
        t_perm: Tensor,
        shape: tuple[int, int],
        block: tuple[int, int] = (1, 1),
        row_parts: int = 1,
        col_parts: int = 1,
    ) -> SparsityPattern:
        """Pattern over existing int32 index tensors: shared, not checked (see validate()).

        Counts are read when first asked for and then kept: after writing into the tensors by
        another way than rewrite_, make a new pattern over them.
        """
        pattern = cls.__new__(cls)
        pattern._grid = index.make_grid(shape, block, row_parts, col_parts)
        pattern.crow_indices, pattern.col_indices = crow, col
        pattern.t_crow, pattern.t_row, pattern.t_perm = t_crow, t_row, t_perm
        pattern._nnzb = pattern._nnz = None
        return pattern

    @classmethod
    def random(
        cls,
        shape: tuple[int, int],
        density: float | None = None,
        nnzb: int | None = None,
        block: tuple[int, int] = (1, 1),
        row_parts: int = 1,
        col_parts: int = 1,
        generator: torch.Generator | None = None,
        capacity: int | None = None,
        device: torch.device | str | None = None,
    ) -> SparsityPattern:
        """Exactly `nnzb` (or round(density * blocks), above density 0 at least 1) random blocks.

        Uniform, without replacement, drawn on the generator's device (CPU without one).
        """
        grid = index.make_grid(shape, block, row_parts, col_parts)
        count = index.blocks_wanted(density, nnzb, grid.blocks)
        keys = index.draw_keys(grid, count, generator)
        if device is not None:
            keys = keys.to(device)
        return cls.from_keys(keys, shape, block, row_parts, col_parts, capacity)

    @classmethod
    def full(
        cls,
        shape: tuple[int, int],
        block: tuple[int, int] = (1, 1),
        row_parts: int = 1,
        col_parts: int = 1,
        capacity: int | None = None,
        device: torch.device | str | None = None,
    ) -> SparsityPattern:
        """Pattern that stores every block."""
        grid = index.make_grid(shape, block, row_parts, col_parts)
        checks.check_int("number of blocks", grid.blocks, 1)
        keys = torch.arange(grid.blocks, device=device)
        return cls.from_keys(keys, shape, block, row_parts, col_parts, capacity)

    @classmethod
    def from_torch(cls, tensor: Tensor) -> tuple[SparsityPattern, Tensor]:
        """(pattern, values [capacity, bh, bw]) of a torch.sparse_csr or sparse_bsr matrix.

        Values share the tensor's memory, and so do int32 indices (clone() before rewrite_ to keep
        the tensor as it is); int64 indices, and an empty matrix (which needs one place), are
        copied.
        """
        from ._pattern_torch import from_torch

        return from_torch(cls, tensor)

    def to_torch(self, values: Tensor) -> Tensor:
        """`values` [>= nnzb, bh, bw] as torch.sparse_csr (block (1, 1)) or sparse_bsr [rows, cols].

        Shares memory with the values and with crow_indices and col_indices, without autograd
        history. Segments of rows or columns are laid side by side, as in the matrix. Raises
        ValueError if a block is partial: torch wants blocks that divide the shape.
        """
        from ._pattern_torch import to_torch

        return to_torch(self, values)

    @property
    def shape(self) -> tuple[int, int]:
        return self._grid.rows, self._grid.cols

    @property
    def block(self) -> tuple[int, int]:
        return self._grid.bh, self._grid.bw

    @property
    def row_parts(self) -> int:
        return self._grid.row_parts

    @property
    def col_parts(self) -> int:
        return self._grid.col_parts

    @property
    def block_rows(self) -> int:
        return self._grid.block_rows

    @property
    def block_cols(self) -> int:
        return self._grid.block_cols

    @property
    def capacity(self) -> int:
        """Places for blocks in the index tensors."""
        return self.col_indices.numel()

    @property
    def nnzb(self) -> int:
        """Stored blocks; kept on the host, so that asking costs no synchronisation."""
        if self._nnzb is None:
            self._nnzb = int(self.crow_indices[-1])
        return self._nnzb

    @property
    def nnz(self) -> int:
        """Matrix elements inside stored blocks; what a partial block has outside does not count."""
        if self._nnz is None:
            partial, whole = self.has_partial_blocks, self.nnzb * self._grid.bh * self._grid.bw
            self._nnz = int(self.element_counts().sum()) if partial else whole
        return self._nnz

    @property
    def has_partial_blocks(self) -> bool:
        return self._grid.has_partial_blocks

    @property
    def numel(self) -> int:
        return self._grid.rows * self._grid.cols

    @property
    def density(self) -> float:
        return self.nnz / self.numel

    @property
    def device(self) -> torch.device:
        return self.crow_indices.device

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(crow_indices, col_indices, t_crow, t_row, t_perm), as operators take them."""
        return self.crow_indices, self.col_indices, self.t_crow, self.t_row, self.t_perm

    def block_row_indices(self) -> Tensor:
        """Block row of each stored block, int64 [nnzb]."""
        return index.rows_of(self.crow_indices, self.nnzb)

    def keys(self) -> Tensor:
        """block_row * block_cols + block_col of each stored block, int64 [nnzb], increasing."""
        return self.block_row_indices() * self.block_cols + self.col_indices[: self.nnzb].long()

    def block_mask(self) -> Tensor:
        """Which blocks are stored, bool [block_rows, block_cols]."""
        mask = torch.zeros(self._grid.blocks, dtype=torch.bool, device=self.device)
        mask[self.keys()] = True
        return mask.view(self.block_rows, self.block_cols)

    def mask(self) -> Tensor:
        """Which matrix elements lie in stored blocks, bool [rows, cols]."""
        ones = torch.ones((), dtype=torch.bool, device=self.device)
        return self.expand(ones.expand(self.nnzb, *self.block))

    def element_counts(self) -> Tensor:
        """Matrix elements inside each stored block, int64 [nnzb]."""
        heights, widths = self._grid.heights(self.device), self._grid.widths(self.device)
        return heights[self.block_row_indices()] * widths[self.col_indices[: self.nnzb].long()]

    def inside_mask(self) -> Tensor | None:
        """Entries of stored blocks that lie in the matrix, bool [nnzb, bh, bw]; None if all do."""
        if not self._grid.has_partial_blocks:
            return None
        bh, bw = self.block
        height = self._grid.heights(self.device)[self.block_row_indices()]
        width = self._grid.widths(self.device)[self.col_indices[: self.nnzb].long()]
        rows = torch.arange(bh, device=self.device) < height[:, None]
        cols = torch.arange(bw, device=self.device) < width[:, None]
        return rows[:, :, None] & cols[:, None, :]

    def compress(self, dense: Tensor) -> Tensor:
        """Values [capacity, bh, bw] of `dense` [rows, cols]; zero in the tail and outside."""
        if dense.ndim != 2 or tuple(dense.shape) != self.shape:
            raise ValueError(f"dense: expected shape {self.shape}, got {tuple(dense.shape)}")
        return index.gather(dense, self.crow_indices, self.col_indices, self.nnzb, self._grid)

    def expand(self, values: Tensor) -> Tensor:
        """Matrix [rows, cols] of `values` [>= nnzb, bh, bw], zero where no block is stored."""
        self._check_values(values)
        return index.scatter(values, self.crow_indices, self.col_indices, self.nnzb, self._grid)

    def rewrite_(self, keys: Tensor, check: bool = True) -> bool:
        """Make `keys` (int64 [nnzb], strictly increasing) the stored blocks, in place.

        The index tensors stay the same objects and keep their memory, unless more blocks come than
        there is capacity for: then new tensors of 1.25 times the capacity (at least what is
        needed) take their place and the result is True. Checking costs a host synchronisation on a
        GPU; `check=False` is for callers that have just made the keys by sorting. Nothing is
        written if a check fails.
        """
        if check:
            checks.check_keys(keys, self._grid.blocks, self.block_cols)
        count = checks.check_int("keys.numel()", keys.numel(), 0)
        fresh = index.build_index(keys.to(self.device), self._grid)
        if grown := count > self.capacity:
            wanted = min(math.ceil(self.capacity * _GROWTH), checks.INT32_MAX)
            self._allocate(max(count, wanted), self.device)
        for old, new in zip(self.tensors(), fresh, strict=True):
            old[: new.numel()].copy_(new)
            old[new.numel() :].zero_()
        self._nnzb, self._nnz = count, None
        return grown

    def clone(self) -> SparsityPattern:
        """A copy that shares no memory."""
        return self._with([array.clone() for array in self.tensors()])

    def to(self, device: torch.device | str) -> SparsityPattern:
        """The pattern on `device`; itself if it is there already."""
        moved = [array.to(device) for array in self.tensors()]
        same = all(new is old for new, old in zip(moved, self.tensors(), strict=True))
        return self if same else self._with(moved)

    def validate(self) -> None:
        """Check all five index arrays; PatternError names the first wrong array and position."""
        index.validate(self.tensors(), self._grid)

    def __eq__(self, other: object) -> bool:
        """Same matrix, blocks, segments and stored blocks; capacity and device do not matter."""
        if not isinstance(other, SparsityPattern):
            return NotImplemented
        if self._grid != other._grid or self.nnzb != other.nnzb:
            return False
        return torch.equal(self.keys().cpu(), other.keys().cpu())

    __hash__ = None  # type: ignore[assignment]  # mutable: rewrite_ changes what equality compares

    def __repr__(self) -> str:
        return (
            f"SparsityPattern(shape={self.shape}, block={self.block}, row_parts={self.row_parts}, "
            f"col_parts={self.col_parts}, nnzb={self.nnzb}, density={self.density:.4g}, "
            f"capacity={self.capacity}, device='{self.device}')"
        )

    def _allocate(self, capacity: int, device: torch.device | str | None) -> None:
        sizes = (self.block_rows + 1, capacity, self.block_cols + 1, capacity, capacity)
        arrays = [torch.zeros(size, dtype=torch.int32, device=device) for size in sizes]
        self.crow_indices, self.col_indices, self.t_crow, self.t_row, self.t_perm = arrays

    def _with(self, arrays: list[Tensor]) -> SparsityPattern:
        crow, col, t_crow, t_row, t_perm = arrays
        pattern = type(self).from_indices(
            crow, col, t_crow, t_row, t_perm, self.shape, self.block, self.row_parts, self.col_parts
        )
        pattern._nnzb, pattern._nnz = self._nnzb, self._nnz
        return pattern

    def _check_values(self, values: Tensor) -> None:
        if values.ndim != 3 or values.shape[0] < self.nnzb or tuple(values.shape[1:]) != self.block:
            raise ValueError(
                f"values: expected shape [{self.nnzb} or more, {self.block[0]}, {self.block[1]}], "
                f"got {tuple(values.shape)}; values and pattern do not belong together"
            )
