"""sparsify(model) makes linear and convolution layers of any model sparse; densify undoes it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import torch
from torch import nn

from sparse_kernels.nn import fusion
from sparse_kernels.nn._auto_block import Block, block_of
from sparse_kernels.nn._eligible import (
    Eligibility,
    Exclude,
    Exclusion,
    is_candidate,
    move_hooks,
    segment,
)
from sparse_kernels.nn._initial import check_block, check_density
from sparse_kernels.nn._select import Keep, check_keep
from sparse_kernels.nn.base import DENSE_MASKED, SparseLayer
from sparse_kernels.nn.conv import SparseConv2d
from sparse_kernels.nn.distribution import (
    LayerSize,
    erk_counts,
    erk_densities,
    uniform_counts,
)
from sparse_kernels.nn.linear import SparseLinear
from sparse_kernels.nn.report import SparsifyReport, SparsifyRow

Distribution = Literal["uniform", "er", "erk"]
_Layers = dict[str, nn.Linear | nn.Conv2d]
_ANY_SEGMENT = (2**31, 2**31)


def sparsify(
    model: nn.Module,
    *,
    density: float | Mapping[str, float] = 0.1,
    distribution: Distribution = "uniform",
    block: Block = (1, 1),
    exclude: Exclude | Iterable[Exclude] = (),
    keep: Keep = "random",
    fuse: bool = True,
    generator: torch.Generator | None = None,
) -> SparsifyReport:
    """Replace the nn.Linear and nn.Conv2d layers of ``model`` by sparse ones, in place.

    Weights at the kept positions keep their values; bias parameters stay the same objects; mode,
    device, dtype and ``requires_grad`` stay.  Make the optimizer AFTER this call: the weights are
    new parameters (``values``).  Norms and poolings become subclasses that keep the layout of the
    sparse layers, and a ReLU directly after a norm in an nn.Sequential is computed by that norm.
    nn.Dropout becomes sparse_kernels.nn.Dropout, whose random numbers are not those of torch.

    Args:
        model: any nn.Module that contains such layers; a lone layer has ``from_dense``.
        density: fraction of weights to keep, in (0, 1], or a fraction per layer name (layers not
            named stay dense).
        distribution: "uniform" gives every layer ``density``; "erk" gives small layers more
            (Erdos-Renyi-kernel, RigL), with ``density`` over all of them together; "er" the same
            by numbers of channels alone (SET).
        block: (rows, columns) of a stored block, or "auto": for each layer the largest that leaves
            at least 8 blocks per block row on average (density * block columns >= 8) and divides
            it well.  On a GPU among (64, 64), (32, 32), (16, 16), where blocks laid over the layer
            (over one group and kernel position) cover at most an eighth more than it; on the CPU
            among (4, 1), (2, 1), where the height divides the rows.  (1, 1) where none does.  The
            layer's device decides, so move the model there first.  Layers of different blocks are
            budgets of their own in ``SparseMomentum``.
        exclude: names (everything below a name too, shell wildcards allowed), module types, or
            callables (name, module) -> bool.
        keep: "random" positions, or "magnitude": the blocks of largest mean |w| of each layer,
            for pretrained weights.
        fuse: whether ReLUs (and 2x2 max poolings after them) may be fused into norms.
        generator: source of random positions.

    Returns:
        A ``SparsifyReport``: one row per layer, with the reason where one was skipped: tied
        weights, weights that torch's attention reads, hooks, parametrizations, subclasses, layers
        smaller than the block.  Layers denser than ``DENSE_MASKED_ABOVE`` are stored dense-masked
        (``tune`` then measures where that begins to pay).

    Raises:
        ValueError, TypeError: arguments out of range, unknown names, a model that is one layer.
            The model is then unchanged.
    """
    _check_arguments(model, density, distribution, block, keep)
    exclusion = Exclusion(exclude, model)
    eligible, reasons = _sort_out(model, exclusion, block)
    eligible = _only_named(density, eligible, reasons)
    blocks, counts = _shares(eligible, density, distribution, block)
    replaced: dict[int, nn.Module] = {
        id(module): _make_sparse(module, count, sides, keep, generator)
        for module, count, sides in zip(eligible.values(), counts, blocks, strict=True)
    }
    fusion.swap_children(model, replaced)
    rows = _account(model, set(map(id, replaced.values())), reasons)
    if any(row.action in ("sparsified", "kept") for row in rows):
        rows += fusion.keep_layout(model, exclusion)
        if fuse:
            rows += fusion.fuse_relus(model, exclusion)
            pools = fusion.fuse_pools(model, exclusion)
            told = {row.name for row in pools}
            rows = [row for row in rows if row.name not in told] + pools
    position = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return SparsifyReport(sorted(rows, key=lambda row: position[row.name]))


def densify(model: nn.Module) -> nn.Module:
    """The ordinary torch model again: sparse layers become nn.Linear / nn.Conv2d, in place.

    Weights that did not exist are zero.  Norms, poolings and what was fused become what they were;
    hooks and bias parameters stay.  Returns ``model`` (a new module where ``model`` itself is a
    sparse layer).  An optimizer must be made anew, for the weights are new parameters.
    """
    replaced: dict[int, nn.Module] = {}
    for layer in model.modules():
        if isinstance(layer, SparseLayer):
            dense = layer.to_dense()
            if layer.bias is not None:
                dense.register_parameter("bias", layer.bias)
            move_hooks(layer, dense)
            replaced[id(layer)] = dense
    fusion.swap_children(model, replaced)
    model = replaced.get(id(model), model)
    return fusion.restore(model)


def _check_arguments(
    model: nn.Module,
    density: float | Mapping[str, float],
    distribution: str,
    block: Block,
    keep: str,
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"sparsify takes an nn.Module, got {type(model).__name__}")
    if is_candidate(model):
        raise ValueError(
            f"the model is a single {type(model).__name__}, which cannot be replaced in place; use "
            "SparseLinear.from_dense or SparseConv2d.from_dense, or wrap it in nn.Sequential"
        )
    if distribution not in get_args(Distribution):
        names = ", ".join(get_args(Distribution))
        raise ValueError(f"distribution must be one of {names}, got {distribution!r}")
    if block != "auto":
        check_block(block, _ANY_SEGMENT)
    check_keep(keep)
    if not isinstance(density, Mapping):
        check_density(density)
        return
    if distribution != "uniform":
        raise ValueError("a density per layer leaves nothing to distribute; drop distribution")
    for name, value in density.items():
        check_density(value, f"density[{name!r}]")


def _sort_out(
    model: nn.Module, exclusion: Exclusion, block: Block
) -> tuple[_Layers, dict[str, str]]:
    """Layers that may become sparse, and the reasons for those that may not, by name."""
    eligibility = Eligibility(model)
    eligible: _Layers = {}
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        if not is_candidate(module):
            continue
        fits = (1, 1) if block == "auto" else block  # "auto" chooses what fits
        reason = exclusion.reason(name, module) or eligibility.reason(module, fits)
        if reason is not None:
            reasons[name] = reason
        else:
            assert isinstance(module, (nn.Linear, nn.Conv2d))
            eligible[name] = module
    return eligible, reasons


def _only_named(
    density: float | Mapping[str, float], eligible: _Layers, reasons: dict[str, str]
) -> _Layers:
    """With a density per name, the layers that have one; the others go to ``reasons``."""
    if not isinstance(density, Mapping):
        return eligible
    unknown = [name for name in density if name not in eligible and name not in reasons]
    if unknown:
        raise ValueError(
            f"density names {', '.join(map(repr, unknown))}, but no linear or convolution layer is "
            f"called so; layers of this model: {', '.join([*eligible, *reasons])}"
        )
    for name in eligible:
        if name not in density:
            reasons[name] = "has no entry in density"
    return {name: module for name, module in eligible.items() if name in density}


def _size(module: nn.Linear | nn.Conv2d, block: tuple[int, int], kernel: bool = True) -> LayerSize:
    """Shape and blocks of a layer; the shape without its kernel's sides if ``kernel`` is False."""
    rows, cols = segment(module)
    per_segment = math.ceil(rows / block[0]) * math.ceil(cols / block[1])
    shape = tuple(module.weight.shape)
    segments = math.prod(shape[2:]) * (1 if isinstance(module, nn.Linear) else module.groups)
    return LayerSize(shape if kernel else shape[:2], per_segment * segments)


def _shares(
    eligible: _Layers,
    density: float | Mapping[str, float],
    distribution: str,
    block: Block,
) -> tuple[list[tuple[int, int]], list[int]]:
    """Block, and number of blocks to keep, of each eligible layer."""
    modules = list(eligible.values())
    kernel = distribution != "er"
    distribution = "erk" if distribution == "er" else distribution
    if block == "auto":
        # Blocks of several sizes have no total to be exact about: each layer has its density.
        elements = [_size(module, (1, 1), kernel) for module in modules]
        shares = _densities(eligible, density, distribution, elements)
        blocks = [
            check_block(block_of(module, segment(module), block, share), _ANY_SEGMENT)
            for module, share in zip(modules, shares, strict=True)
        ]
        sizes = [_size(module, sides) for module, sides in zip(modules, blocks, strict=True)]
        each = zip(sizes, shares, strict=True)
        return blocks, [uniform_counts([size], share)[0] for size, share in each]
    sides = check_block(block, _ANY_SEGMENT)
    sizes = [_size(module, sides, kernel) for module in modules]
    if distribution == "erk" and sizes and not isinstance(density, Mapping):
        counts = erk_counts(sizes, density)
    else:
        each = zip(sizes, _densities(eligible, density, distribution, sizes), strict=True)
        counts = [uniform_counts([size], share)[0] for size, share in each]
    return [sides] * len(sizes), counts


def _densities(
    eligible: _Layers,
    density: float | Mapping[str, float],
    distribution: str,
    sizes: list[LayerSize],
) -> list[float]:
    """The density that is asked of each eligible layer."""
    if isinstance(density, Mapping):
        return [density[name] for name in eligible]
    if distribution == "erk" and sizes:
        return erk_densities(sizes, density)
    return [density] * len(sizes)


def _make_sparse(
    module: nn.Linear | nn.Conv2d,
    nnzb: int,
    block: int | tuple[int, int],
    keep: Keep,
    generator: torch.Generator | None,
) -> SparseLayer:
    options = {"nnzb": nnzb, "block": block, "keep": keep, "generator": generator}
    if isinstance(module, nn.Linear):
        layer: SparseLayer = SparseLinear.from_dense(module, **options)  # type: ignore[arg-type]
    else:
        layer = SparseConv2d.from_dense(module, **options)  # type: ignore[arg-type]
    if module.bias is not None:
        # The very object, which a training loop may hold already.
        layer.register_parameter("bias", module._parameters["bias"])
    return layer.to_storage_(DENSE_MASKED) if layer.density > layer.dense_above else layer


def _account(model: nn.Module, new: set[int], reasons: dict[str, str]) -> list[SparsifyRow]:
    """One row per linear and convolution layer, sparse or skipped."""
    rows = []
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, SparseLayer):
            shape = tuple(module.weight_shape)
            action, reason = ("sparsified", "") if id(module) in new else ("kept", "already sparse")
            if module.storage == DENSE_MASKED:
                reason = f"{reason}, {DENSE_MASKED}".lstrip(", ")
            rows.append(
                SparsifyRow(
                    name,
                    kind,
                    shape,
                    module.density,
                    module.nnz,
                    action,  # type: ignore[arg-type]
                    reason,
                    module.block,
                )
            )
        elif is_candidate(module):
            weight = module._parameters.get("weight")
            lazy = weight is None or isinstance(weight, nn.UninitializedParameter)
            shape = () if lazy or weight is None else tuple(weight.shape)
            nnz = math.prod(shape) if shape else 0
            rows.append(SparsifyRow(name, kind, shape, 1.0, nnz, "skipped", reasons[name]))
    return rows
