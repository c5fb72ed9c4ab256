"""A planned change carried out: which storage a layer takes, and what moves with its weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sparse_kernels.nn.base import SparseLayer

from .blocks import BlockGrid
from .rewrite import COMPRESSED, DENSE_MASKED, rewrite, rewrite_queued
from .signals import LayerSignal
from .update import LayerChange

STORAGE_HYSTERESIS = 0.8
"""A dense-masked layer is compressed again below this share of dense_above."""


def apply_change(
    signal: LayerSignal, change: LayerChange, optimizer: Any, dense_above: float | None
) -> bool:
    """Give the signal's layer its new blocks; True if its storage was newly allocated.

    dense_above: density above which layers are stored dense; None goes by the layer's own.
    """
    layer = signal.layer
    storage = _storage_for(layer, change.keys, dense_above)
    if change.added is None:
        there = signal.grown_state(change.keys)
        return rewrite_queued(layer, optimizer, change.keys, there, storage)
    grown = signal.grown_state(change.added)
    return rewrite(layer, optimizer, change.keys, grown, storage)


def _storage_for(layer: SparseLayer, keys: Tensor, dense_above: float | None) -> str:
    # Of the blocks: their number is known without a look at the device.
    density = keys.numel() / BlockGrid.of(layer).blocks
    above = layer.dense_above if dense_above is None else dense_above
    if density > above:
        return DENSE_MASKED
    if density < STORAGE_HYSTERESIS * above:
        return COMPRESSED
    return layer.storage
