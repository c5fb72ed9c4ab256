"""Averages of weights (EMA, SWA) over mask updates: the average moves to the model's new pattern.

`torch.optim.swa_utils.AveragedModel` averages `values` slot by slot, and a mask update gives slots
to other weights.  `follow` moves the average as the update moved the values: weights that stay keep
their averages, weights that were pruned are dropped, grown ones start at zero, as they do in the
model.  The result is the average of the dense weights, times the present mask after every update.
"""

from __future__ import annotations

import torch
from torch import nn

from sparse_kernels.nn.base import SparseLayer

from .capacity import set_capacity
from .layers import sparse_layers
from .rewrite import COMPRESSED, rewrite


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module) -> None:
    """Give `average` the patterns, storages and capacities of `model`, and move its averages there.

        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
        masks = SparseMomentum(..., on_update=lambda record: follow(average, model))
        # then, every step: optimizer.step(); masks.step(); average.update_parameters(model)

    average: an AveragedModel, or another copy of `model` (any of the two may be wrapped). Its
        dense parameters and other buffers are left alone. Equal patterns cost a comparison.
    Raises ValueError, before anything is changed: an AveragedModel with use_buffers=True (it would
        average indices, too), other sparse layers than the model's.
    """
    if getattr(average, "use_buffers", False):
        raise ValueError(
            f"follow: {type(average).__name__} has use_buffers=True, which averages the indices of "
            "sparse layers as if they were weights; expected use_buffers=False, which copies "
            "buffers (running statistics included) from the model"
        )
    own = [layer for _, layer in sparse_layers(average)]
    theirs = list(sparse_layers(model))
    if len(own) != len(theirs):
        raise ValueError(
            f"follow: the average has {len(own)} sparse layers, the model {len(theirs)}; expected "
            "an average of this very model, made after sparsify"
        )
    for mine, (name, layer) in zip(own, theirs, strict=True):
        if (mine.matrix_shape, mine.block) != (layer.matrix_shape, layer.block):
            raise ValueError(
                f"follow: layer {name!r} is {layer.matrix_shape} in blocks {layer.block}, in the "
                f"average {mine.matrix_shape} in blocks {mine.block}; expected the same"
            )
    for mine, (_, layer) in zip(own, theirs, strict=True):
        _move(mine, layer)


def _move(mine: SparseLayer, layer: SparseLayer) -> None:
    keys = layer.pattern.keys()
    if mine.storage != layer.storage or not torch.equal(mine.pattern.keys(), keys):
        rewrite(mine, None, keys.to(mine.values.device), storage=layer.storage)
    if layer.storage == COMPRESSED and mine.pattern.capacity != layer.pattern.capacity:
        set_capacity(mine, None, layer.pattern.capacity)  # averaging takes slot by slot
