"""Choosing which blocks of a dense weight a sparse layer keeps."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from sparse_kernels.nn._initial import check_block, check_density
from sparse_kernels.pattern import SparsityPattern

Keep = Literal["random", "magnitude"]


def check_keep(keep: str) -> None:
    """ValueError unless ``keep`` names a way to choose blocks."""
    if keep not in get_args(Keep):
        raise ValueError(
            f"keep must be one of {', '.join(map(repr, get_args(Keep)))}, got {keep!r}"
        )


def choose_pattern(
    matrix: Tensor,
    density: float,
    block: int | tuple[int, int],
    pattern: SparsityPattern | None,
    keep: Keep,
    generator: torch.Generator | None,
    *,
    row_parts: int = 1,
    col_parts: int = 1,
    nnzb: int | None = None,
) -> SparsityPattern:
    """The pattern of the blocks of ``matrix`` [rows, cols] that a sparse layer keeps.

    ``pattern`` wins if given; else ``nnzb`` blocks, or ``round(density * blocks)`` of them, at
    least one.  Raises ValueError for weights that have no content (meta) or are not finite.
    """
    check_keep(keep)
    if not matrix.is_floating_point():
        raise TypeError(f"the dense weight must be floating point, got {matrix.dtype}")
    if matrix.is_meta:
        raise ValueError(
            "the dense layer is on the meta device and has no weights to keep; materialise it "
            "first (to_empty and load_state_dict)"
        )
    if pattern is not None:
        return pattern.to(matrix.device)
    rows, cols = int(matrix.shape[0]), int(matrix.shape[1])
    sides = check_block(block, (rows // row_parts, cols // col_parts))
    if nnzb is None:
        check_density(density)
    if keep == "random":
        return SparsityPattern.random(
            (rows, cols),
            density=None if nnzb is not None else density,
            nnzb=nnzb,
            block=sides,
            row_parts=row_parts,
            col_parts=col_parts,
            generator=generator,
            device=matrix.device,
        )
    scores = _block_means(matrix, sides, row_parts, col_parts)
    count = max(1, round(density * scores.numel())) if nnzb is None else nnzb
    # A stable sort keeps ties in order of index: equal weights always give equal masks.
    best = torch.sort(scores, descending=True, stable=True).indices[:count]
    keys = torch.sort(best).values
    return SparsityPattern.from_keys(keys, (rows, cols), sides, row_parts, col_parts)


def _block_means(matrix: Tensor, block: tuple[int, int], row_parts: int, col_parts: int) -> Tensor:
    """Mean |w| of every block, [block_rows * block_cols], elements inside the matrix only."""
    magnitude = matrix.abs()
    if not bool(torch.isfinite(magnitude).all()):
        raise ValueError(
            "the dense weight holds NaN or infinity, so its blocks have no order of magnitude; "
            "repair the weights, or use keep='random'"
        )
    if block == (1, 1):
        return magnitude.reshape(-1)
    rows, cols = matrix.shape
    full = SparsityPattern.full(
        (rows, cols), block=block, row_parts=row_parts, col_parts=col_parts
    ).to(matrix.device)
    sums = full.compress(magnitude).sum(dim=(1, 2))[: full.nnzb]
    return sums / full.element_counts()
