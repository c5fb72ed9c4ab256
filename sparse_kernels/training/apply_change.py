"""Planned changes carried out: which storage a layer takes, and what moves with its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sparse_kernels.nn.base import SparseLayer

from .blocks import BlockGrid
from .rewrite import COMPRESSED, DENSE_MASKED, rewrite, rewrite_queued
from .schedule import UpdateSchedule
from .signals import LayerSignal
from .update import LayerChange

STORAGE_HYSTERESIS = 0.8
"""A dense-masked layer is compressed again below this share of dense_above."""


@dataclass
class Applied:
    """What changed beside the patterns: layers that moved, with their new storage; those whose
    tensors were newly allocated.
    """

    moved: dict[str, str] = field(default_factory=dict)
    reallocated: list[str] = field(default_factory=list)


def apply_changes(
    signals: Sequence[LayerSignal],
    changes: Sequence[LayerChange],
    optimizer: Any,
    dense_above: float | None,
    schedule: UpdateSchedule,
    step: int,
) -> Applied:
    """Give every signal's layer its new blocks, and end the signal's window of this update.

    dense_above: density above which layers are stored dense; None goes by the layer's own.
    """
    done = Applied()
    for signal, change in zip(signals, changes, strict=True):
        stored = signal.layer.storage
        if _apply_change(signal, change, optimizer, dense_above):
            done.reallocated.append(signal.name)
        if signal.layer.storage != stored:
            done.moved[signal.name] = signal.layer.storage
        signal.finish_update(schedule, step)
    return done


def _apply_change(
    signal: LayerSignal, change: LayerChange, optimizer: Any, dense_above: float | None
) -> bool:
    """Whether the layer's storage was newly allocated."""
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
