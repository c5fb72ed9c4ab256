"""The sparse layers of a model, each with its growth signal."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from sparse_kernels.nn.base import SparseLayer

from .optimizers import OptimizerView
from .sampled import SampledSignal
from .signals import LayerSignal


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, SparseLayer]]:
    """(name, layer) of every sparse layer of `model`, each once, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, SparseLayer):
            yield name, module


def make_signals(
    model: nn.Module, optimizer: torch.optim.Optimizer, kind: str, tolerance: float
) -> tuple[list[LayerSignal], list[str]]:
    """A signal per trained sparse layer, and the names of the frozen ones.

    Raises ValueError: no trained sparse layer, values shared by two layers, a trained layer that
    the optimizer does not hold.
    """
    made = SampledSignal if kind == "sampled" else LayerSignal
    signals: list[LayerSignal] = []
    fixed: list[str] = []
    owners: dict[int, str] = {}
    for name, layer in sparse_layers(model):
        if id(layer.values) in owners:
            raise ValueError(
                f"layers {owners[id(layer.values)]!r} and {name!r} share one `values` "
                "parameter; tied sparse weights cannot be pruned apart: give each layer its own"
            )
        owners[id(layer.values)] = name
        if not layer.values.requires_grad:
            fixed.append(name)
            continue
        view = OptimizerView(optimizer, layer.values, name)
        signals.append(made(name, layer, view, kind, tolerance))
    if not signals:
        what = "no sparse layer; call sparsify(model, density=...) before building"
        if fixed:
            what = (
                "no sparse layer to train: `values` of every one has requires_grad=False; "
                "unfreeze some before building"
            )
        raise ValueError(f"{type(model).__name__} has {what} the optimizer and SparseMomentum")
    return signals, fixed
