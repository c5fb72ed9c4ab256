"""The last part of a mask update on a GPU, for all layers in a few launches of native kernels.

What rewrite_queued (rewrite.py) does layer by layer and tensor by tensor. Layers that it does not
serve are left to that: dense-masked ones, ones that outgrow their capacity, other devices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparse_kernels.backends import cuda_pattern

from .rewrite import COMPRESSED, _slots
from .signals import LayerSignal
from .update import LayerChange


@torch.no_grad()
def rewrite_together(
    signals: Sequence[LayerSignal],
    changes: Sequence[LayerChange],
    storages: Sequence[str],
    optimizer: torch.optim.Optimizer | None,
) -> set[str]:
    """Give layers their new blocks, in place; the result is that of `rewrite_queued`.

    storages: what each layer will have. Returns the names of the layers
    that were rewritten; none where the native CUDA kernels are not built.
    """
    chosen = [
        (signal, change)
        for signal, change, storage in zip(signals, changes, storages, strict=True)
        if change.added is None
        and signal.layer.storage == COMPRESSED == storage
        and change.keys.numel() <= signal.layer.pattern.capacity
        and all(t.is_contiguous() for _, t in _slots(signal.layer, optimizer))
    ]
    keys = [change.keys for _, change in chosen]
    if not cuda_pattern.serves([*keys, *(signal.layer.values.data for signal, _ in chosen)]):
        return set()
    patterns = [signal.layer.pattern for signal, _ in chosen]
    sources = cuda_pattern.locate_blocks([pattern.keys() for pattern in patterns], keys)
    moves: dict[str, list[cuda_pattern.Move]] = {}
    for (signal, change), source in zip(chosen, sources, strict=True):
        start = signal.grown_state(change.keys)
        for name, tensor in _slots(signal.layer, optimizer):
            move = cuda_pattern.Move(tensor, tensor, source, start.get(name))
            moves.setdefault(name, []).append(move)
    cuda_pattern.build_index(patterns, keys)
    for pattern, stored in zip(patterns, keys, strict=True):
        pattern._nnzb, pattern._nnz = stored.numel(), None
    for same in moves.values():  # name by name: the workspace holds a copy of what moves at once
        cuda_pattern.move_blocks(same)
    return {signal.name for signal, _ in chosen}
