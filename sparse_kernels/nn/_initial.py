"""Arguments of a new sparse layer: checks, and the pattern it starts with."""

from __future__ import annotations

import operator
from typing import Any

import torch

from sparse_kernels.pattern import SparsityPattern


def check_size(name: str, value: Any) -> int:
    """``value`` as an int of at least 1; numpy's integers count, as they do for torch."""
    try:
        size = operator.index(value)
    except TypeError:
        size = 0
    if size < 1 or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return size


def check_density(density: float, what: str = "density") -> float:
    """``density`` as a float in (0, 1]; TypeError or ValueError otherwise."""
    if isinstance(density, bool) or not isinstance(density, (int, float)):
        raise TypeError(
            f"{what} must be a number in (0, 1], the fraction of existing weights, got {density!r}"
        )
    if not 0 < density <= 1:
        raise ValueError(
            f"{what} must be in (0, 1], got {density}: 0.05 keeps 5 % of the weights, 1.0 keeps all"
        )
    return float(density)


def check_block(block: int | tuple[int, int], segment: tuple[int, int]) -> tuple[int, int]:
    """``block`` as (bh, bw) that fits ``segment`` rows x columns (of one tap and group)."""
    try:
        bh, bw = (block, block) if isinstance(block, int) else block
        whole = all(isinstance(side, int) and not isinstance(side, bool) for side in (bh, bw))
    except (TypeError, ValueError):
        whole = False
    if not whole or min(bh, bw) < 1:
        raise ValueError(
            f"block must be one or two integers of at least 1 (rows, columns), got {block!r}; "
            '(1, 1) is element sparsity, and sparsify also takes "auto"'
        )
    if bh > segment[0] or bw > segment[1]:
        raise ValueError(
            f"block ({bh}, {bw}) is larger than the layer: it has {segment[0]} output rows and "
            f"{segment[1]} input columns (per group and kernel position); choose a smaller block"
        )
    return bh, bw


def check_dtype(dtype: torch.dtype | None) -> torch.dtype:
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point, got {dtype}; use torch.float32")
    return dtype


def initial_pattern(
    shape: tuple[int, int],
    parts: tuple[int, int],
    density: float,
    block: int | tuple[int, int],
    pattern: SparsityPattern | None,
    generator: torch.Generator | None,
    capacity: int | None,
) -> SparsityPattern:
    """A copy of ``pattern`` if given, else a random one, for a weight of ``shape`` and ``parts``.

    ``parts`` = (row_parts, col_parts).  Raises ValueError where the arguments do not fit.
    """
    segment = (shape[0] // parts[0], shape[1] // parts[1])
    if pattern is None:
        sides = check_block(block, segment)
        return SparsityPattern.random(
            shape,
            density=check_density(density),
            block=sides,
            row_parts=parts[0],
            col_parts=parts[1],
            generator=generator,
            capacity=capacity,
        )
    got = (tuple(pattern.shape), pattern.row_parts, pattern.col_parts)
    want = (shape, *parts)
    if got != want:
        raise ValueError(
            f"pattern must have (shape, row_parts, col_parts) = {want} for this layer, got {got}; "
            f"make it with SparsityPattern.random({shape}, row_parts={parts[0]}, "
            f"col_parts={parts[1]}, ...)"
        )
    if block not in (1, (1, 1)) and check_block(block, segment) != pattern.block:
        raise ValueError(
            f"block {block} and the pattern's block {pattern.block} differ; give only pattern"
        )
    pattern.validate()
    if capacity is None:
        return pattern.clone()
    return SparsityPattern.from_keys(
        pattern.keys(), pattern.shape, pattern.block, *parts, capacity=capacity
    )
