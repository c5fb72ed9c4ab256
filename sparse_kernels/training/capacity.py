"""Room for blocks before it is needed, so that pointers outlive mask updates (CUDA graphs)."""

from __future__ import annotations

import math

import torch
from torch import nn

from sparse_kernels.nn.base import SparseLayer
from sparse_kernels.pattern import SparsityPattern

from .layers import sparse_layers
from .rewrite import COMPRESSED, write_compressed


@torch.no_grad()
def reserve(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, room: float = 2.0
) -> dict[str, int]:
    """Give every compressed layer places for ``room`` times the blocks that it stores now.

    A mask update rewrites a layer in place while its capacity suffices. Redistribution makes some
    layers larger; one that outgrows its capacity gets new tensors (``UpdateRecord.reallocated``),
    and a captured CUDA graph still points to the old ones: it must be captured again. With room for
    what a layer may come to hold, no update reallocates. Call this after ``sparsify``, before
    capture; ``values`` stay the same objects.

    room: at least 1; a layer never gets more places than it has blocks, so ``math.inf`` excludes
        reallocation for good, at the memory of a dense layer.
    optimizer: the one whose state has the shape of the values; needed once it has stepped.

    Returns the new capacity of each layer that grew, by name.
    Raises ValueError: room below 1; state of ``values`` that no optimizer was given for shows at
    its next step, as a shape that does not fit.
    """
    if not room >= 1:
        raise ValueError(f"room must be at least 1 (times the stored blocks), got {room!r}")
    grown = {}
    for name, layer in sparse_layers(model):
        if layer.storage != COMPRESSED:
            continue
        pattern = layer.pattern
        blocks = pattern.block_rows * pattern.block_cols
        wanted = blocks if math.isinf(room) else min(blocks, math.ceil(room * pattern.nnzb))
        if wanted > pattern.capacity:
            set_capacity(layer, optimizer, wanted)
            grown[name] = wanted
    return grown


def set_capacity(
    layer: SparseLayer, optimizer: torch.optim.Optimizer | None, capacity: int
) -> None:
    """New tensors with `capacity` places, not fewer than stored blocks, for a compressed layer."""
    old = layer.pattern
    parts = (layer.row_parts, layer.col_parts)
    layer._register_pattern(
        SparsityPattern.from_keys(old.keys(), old.shape, old.block, *parts, capacity=capacity)
    )
    write_compressed(layer, optimizer, lambda name, tensor: tensor[: old.nnzb])
