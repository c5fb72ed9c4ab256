"""The two storages of a sparse layer: to change between them, and the pattern within one."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_kernels.nn._parameter import replace_data
from sparse_kernels.pattern import SparsityPattern

if TYPE_CHECKING:
    from sparse_kernels.nn.base import SparseLayer

logger = logging.getLogger(__name__)

COMPRESSED = "compressed"
DENSE_MASKED = "dense-masked"


@torch.no_grad()
def zero_outside(layer: SparseLayer) -> None:
    """Zero what does not exist: the tail, entries outside of the matrix, masked entries."""
    if layer.storage == DENSE_MASKED:
        layer.values.mul_(layer.mask)
        return
    pattern = layer.pattern
    layer.values[pattern.nnzb :] = 0
    inside = pattern.inside_mask()
    if inside is not None:
        layer.values[: pattern.nnzb].mul_(inside)


def rewrite_pattern(layer: SparseLayer, keys: Tensor, check: bool) -> None:
    """``SparseLayer.set_pattern_``: keys int64 [nnzb], ascending; raises PatternError."""
    pattern = layer.pattern
    if layer.storage == DENSE_MASKED:
        parts = (layer.row_parts, layer.col_parts)
        places = max(1, keys.numel())
        new = SparsityPattern(
            layer.matrix_shape, layer.block, *parts, capacity=places, device=keys.device
        )
        new.rewrite_(keys, check)
        layer.mask.copy_(new.mask())
        layer._remember(new)
        return
    before = pattern.capacity
    if pattern.rewrite_(keys, check):
        layer._register_pattern(pattern)
        layer.capacity_growths += 1
        logger.info(
            "%s %s outgrew its capacity of %d blocks, now %d: buffers were reallocated",
            type(layer).__name__,
            layer.matrix_shape,
            before,
            pattern.capacity,
        )


@torch.no_grad()
def convert(layer: SparseLayer, storage: str) -> None:
    """``SparseLayer.to_storage_``: values, gradient and buffers; raises ValueError."""
    if storage not in (COMPRESSED, DENSE_MASKED):
        raise ValueError(f"storage must be {COMPRESSED!r} or {DENSE_MASKED!r}, got {storage!r}")
    if storage == layer.storage:
        return
    pattern = layer.pattern
    change = pattern.expand if storage == DENSE_MASKED else pattern.compress
    gradient, layer.values.grad = layer.values.grad, None
    replace_data(layer.values, change(layer.values.data))
    if gradient is not None:
        layer.values.grad = change(gradient)
    if storage == DENSE_MASKED:
        layer._register_mask(pattern.mask(), pattern)
    else:
        layer._register_pattern(pattern)
