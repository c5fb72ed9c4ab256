"""Norm, ReLU and pooling around sparse layers: kept in their layout, and given back by densify."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import nn

from sparse_kernels.nn import norm, pooling
from sparse_kernels.nn._eligible import Exclusion, has_hooks
from sparse_kernels.nn.report import SparsifyRow

_LAYOUT_KEEPING: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: norm.BatchNorm1d,
    nn.BatchNorm2d: norm.BatchNorm2d,
    nn.MaxPool2d: pooling.MaxPool2d,
    nn.AvgPool2d: pooling.AvgPool2d,
}
_PLAIN = {ours: plain for plain, ours in _LAYOUT_KEEPING.items()}


class FusedReLU(nn.Identity):
    """Stands where a ReLU stood that the norm before it now computes; ``densify`` puts it back."""

    def __init__(self, relu: nn.ReLU) -> None:
        super().__init__()
        # In a tuple, so that it is no child module.
        self._original = (relu,)
        self.train(relu.training)

    @property
    def original(self) -> nn.ReLU:
        """The module that stood here."""
        return self._original[0]

    def extra_repr(self) -> str:
        """Says where the ReLU went."""
        return "computed by the norm before"


def keep_layout(model: nn.Module, exclusion: Exclusion) -> list[SparsifyRow]:
    """Turn norms and poolings into their layout-keeping subclasses; one row each.

    The class of the module object changes (as torch's lazy modules do), so that parameters,
    buffers, hooks, names and every reference to the module stay.
    """
    rows = []
    for name, module in model.named_modules():
        ours = _LAYOUT_KEEPING.get(type(module))
        if ours is None:
            continue
        kind = type(module).__name__
        reason = exclusion.reason(name, module) or _unsupported(module)
        if reason is None:
            module.__class__ = ours
        action: Any = "skipped" if reason else "replaced"
        rows.append(SparsifyRow(name, kind, (), 0.0, 0, action, reason or "keeps the layout"))
    return rows


def _unsupported(module: nn.Module) -> str | None:
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if isinstance(module, nn.MaxPool2d):
        if module.return_indices:
            return "returns indices"
        if pooling.taps(module) > pooling.MAX_POOL_TAPS:
            return f"its window has more than {pooling.MAX_POOL_TAPS} pixels"
    return None


def _registrations(model: nn.Module) -> dict[int, int]:
    """How often each module object is registered in the model."""
    counts: dict[int, int] = {}
    for parent in model.modules():
        for child in parent._modules.values():
            counts[id(child)] = counts.get(id(child), 0) + 1
    return counts


def fuse_relus(model: nn.Module, exclusion: Exclusion) -> list[SparsifyRow]:
    """Let a norm compute the ReLU directly after it where its one consumer is proven.

    Proven means: both are consecutive children of one plain nn.Sequential, each is registered once
    in the model, and neither has hooks, which would see other values.
    """
    counts = _registrations(model)
    rows = []
    for prefix, parent in model.named_modules():
        if type(parent) is not nn.Sequential or "forward" in parent.__dict__:
            continue
        children = list(parent._modules.items())
        for (_, first), (key, second) in pairwise(children):
            name = f"{prefix}.{key}" if prefix else key
            if not _fusable(first, second, counts) or exclusion.reason(name, second):
                continue
            assert isinstance(first, norm._FeatureMajorNorm) and isinstance(second, nn.ReLU)
            first.relu = True
            parent._modules[key] = FusedReLU(second)
            rows.append(
                SparsifyRow(name, "ReLU", (), 0.0, 0, "fused", "computed by the norm before")
            )
    return rows


def _fusable(first: nn.Module | None, second: nn.Module | None, counts: dict[int, int]) -> bool:
    return (
        isinstance(first, norm._FeatureMajorNorm)
        and type(second) is nn.ReLU
        and not first.relu
        and counts[id(first)] == counts[id(second)] == 1
        and not (has_hooks(first) or has_hooks(second))
        and "forward" not in second.__dict__
    )


def restore(model: nn.Module) -> nn.Module:
    """Undo ``fuse_relus`` and ``keep_layout`` in place; returns the model.

    A norm that includes a ReLU which no FusedReLU stands for (built so by hand) becomes
    nn.Sequential(norm, nn.ReLU()).
    """
    unfused: set[int] = set()
    for parent in model.modules():
        children = list(parent._modules.items())
        for (_, first), (key, second) in pairwise(children):
            if isinstance(second, FusedReLU) and isinstance(first, norm._FeatureMajorNorm):
                parent._modules[key] = second.original.train(second.training)
                unfused.add(id(first))
    replaced: dict[int, nn.Module] = {}
    for module in list(model.modules()):
        plain = _PLAIN.get(type(module))
        if plain is None:
            continue
        includes_relu = module.__dict__.pop("relu", False) and id(module) not in unfused
        module.__class__ = plain
        if includes_relu:
            replaced[id(module)] = nn.Sequential(module, nn.ReLU()).train(module.training)
    swap_children(model, replaced)
    return replaced.get(id(model), model)


def swap_children(model: nn.Module, replaced: dict[int, nn.Module]) -> None:
    """Put ``replaced[id(child)]`` wherever ``child`` is registered below ``model``."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is not None and id(child) in replaced:
                parent._modules[key] = replaced[id(child)]
