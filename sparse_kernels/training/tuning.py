"""tune(model, example): every sparse layer in the storage that is faster on this machine."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from sparse_kernels.nn import tune as planning
from sparse_kernels.nn._tune_problem import Layout
from sparse_kernels.nn.base import SparseLayer
from sparse_kernels.nn.tune_report import TuneReport
from sparse_kernels.plan_cache import PlanCache

from .layers import sparse_layers
from .ownership import owner_of
from .rewrite import rewrite


def tune(
    model: nn.Module,
    example: Any,
    *,
    training: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
    layout: Layout = "seen",
    seconds: float = 1.0,
    cache: bool = True,
) -> TuneReport:
    """Time every sparse layer compressed and dense-masked, and keep the faster storage.

    Runs ``model`` once on ``example`` to see each layer's input (shape, memory order, gradient
    wanted), then times forward (and backward) of each distinct layer in both storages, at its
    present pattern and at a few random ones, for the break-even density ``layer.dense_above``.
    Before that it times the variants of the native kernels, for forward, dgrad and wgrad each, and
    keeps one where it is certainly faster than the built-in rule, by more than 3 %; on a GPU that
    Triton serves, the tiles that its kernels may have.  From then on
    all products of this process take it that have the same geometry, batch and block and nearly as
    many stored blocks; results change by rounding.
    Afterwards nothing changes by itself: storages move only by another ``tune``, or at a mask
    update (``SparseMomentum``, ``rewrite``) that takes a layer's density over its break-even.

    The faster one need not be the compressed one, however sparse the layer: where dense forward
    and backward together take under some 0.3 ms, neither storage may reach ``nn.Linear`` or
    ``nn.Conv2d`` (docs/results.md, "Never slower"); without ``tune`` such layers stay compressed.

    The memory order of inputs is that of the storages the layers have at the time of the call.

    Call it after ``sparsify`` with a batch as in training, under the autocast and with the number
    of threads of the training.  ``values`` stay the same objects, so an optimizer may be there
    already.  One that has stepped holds state in the shape of the old storage: give it as
    ``optimizer`` and its state moves along; that of a ``SparseMomentum`` that drives the model is
    found without.

    Args:
        model: a model with sparse layers on the CPU or a GPU, or a sparse layer itself.  On a GPU
            calls are timed from Python, launches included; those of a captured graph are not.
        example: input of the model: a tensor, a tuple of arguments or a dict of keywords.
        training: whether backward counts too.
        optimizer: the one whose state has the shape of the layers' ``values``.
        layout: "seen": inputs in the memory order in which the model gives them, conversions
            included; "own": each storage with the order it likes best, as for a lone layer.
        seconds: cap on one comparison; there are 2 to 7 for each distinct layer, and half as long
            for the variants of each pass.
        cache: whether facts are read from and written to the disk cache (``plan_cache``).

    The environment variable SPARSE_KERNELS_TUNE=off switches measuring off: layers denser than
    ``DENSE_MASKED_ABOVE`` are then dense-masked, and kernels go by the built-in rules.  In a
    distributed job rank 0 decides for all.

    Returns:
        A ``TuneReport``; ``print`` it.

    Raises:
        ValueError: no sparse layer, one on neither CPU nor GPU, an unknown layout, seconds that
            are not positive, an optimizer that does not hold a layer's ``values``.
    """
    layers = dict(sparse_layers(model))
    _check(layers, layout, seconds)
    holders = {layer: _holder(name, layer, optimizer) for name, layer in layers.items()}
    plan = functools.partial(
        planning.plan_layers,
        model,
        example,
        training=training,
        layout=layout,
        seconds=seconds,
        cache=PlanCache() if cache else None,
    )
    decisions = planning.agreed(model, plan)
    for layer, made in decisions.items():
        planning.apply(layer, made)
        if made.storage != layer.storage:
            rewrite(layer, holders[layer], layer.pattern.keys(), storage=made.storage)
    return planning.report(model, decisions)


def _check(layers: dict[str, SparseLayer], layout: str, seconds: float) -> None:
    if not layers:
        raise ValueError("tune found no sparse layer in the model; call sparsify(model, ...) first")
    for name, layer in layers.items():
        if layer.values.device.type not in ("cpu", "cuda"):
            raise ValueError(
                f"tune measures layers on the CPU or a CUDA device, but {name!r} is on "
                f"{layer.values.device}; move the model, or leave it out"
            )
    if layout not in ("seen", "own"):
        raise ValueError(f"layout must be 'seen' or 'own', got {layout!r}")
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds!r}")


def _holder(
    name: str, layer: SparseLayer, given: torch.optim.Optimizer | None
) -> torch.optim.Optimizer | None:
    """The optimizer whose state moves with the layer."""
    owner = owner_of(layer)
    optimizer = given if owner is None else owner.optimizer
    if given is not None and given is not optimizer:
        raise ValueError(
            f"layer {name!r} is driven by a SparseMomentum with another optimizer than the one "
            "given; leave `optimizer` out"
        )
    if given is not None and layer.values.requires_grad:
        held = any(p is layer.values for group in given.param_groups for p in group["params"])
        if not held:
            raise ValueError(
                f"layer {name!r}: the optimizer does not hold its `values`; build it from "
                "model.parameters() after sparsify()"
            )
    return optimizer
