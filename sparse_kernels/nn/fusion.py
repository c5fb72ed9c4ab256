"""Norm, ReLU, pooling and dropout around sparse layers: replaced, and given back by densify."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import nn

from sparse_kernels.nn import dropout, norm, pooling
from sparse_kernels.nn._eligible import Exclusion, has_hooks
from sparse_kernels.nn.report import SparsifyRow

_LAYOUT_KEEPING: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: norm.BatchNorm1d,
    nn.BatchNorm2d: norm.BatchNorm2d,
    nn.MaxPool2d: pooling.MaxPool2d,
    nn.AvgPool2d: pooling.AvgPool2d,
    nn.Dropout: dropout.Dropout,
}
_PLAIN = {ours: plain for plain, ours in _LAYOUT_KEEPING.items()}


class _Fused(nn.Identity):
    """Stands where a module stood that the norm before it now computes; ``densify`` restores it."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        # In a tuple, so that it is no child module.
        self._original = (original,)
        self.train(original.training)

    @property
    def original(self) -> nn.Module:
        """The module that stood here."""
        return self._original[0]

    def extra_repr(self) -> str:
        """Says where the original went."""
        return "computed by the norm before"


class FusedReLU(_Fused):
    """Stands where a ReLU stood that the norm before it now computes."""


class FusedMaxPool2d(_Fused):
    """Stands where a 2x2 max pooling stood that the norm before it now computes."""


def keep_layout(model: nn.Module, exclusion: Exclusion) -> list[SparsifyRow]:
    """Turn norms, poolings and dropouts into the subclasses of this package; one row each.

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
        kept = "random numbers of its own" if ours is dropout.Dropout else "keeps the layout"
        rows.append(SparsifyRow(name, kind, (), 0.0, 0, action, reason or kept))
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


def fuse_pools(model: nn.Module, exclusion: Exclusion) -> list[SparsifyRow]:
    """Let a norm with a fused ReLU compute the 2x2 max pooling after it; proven as in fuse_relus.

    Before that, the three stood in line in one plain nn.Sequential. A row replaces that of
    ``keep_layout`` for the same name.
    """
    counts = _registrations(model)
    rows = []
    for prefix, parent in model.named_modules():
        if type(parent) is not nn.Sequential or "forward" in parent.__dict__:
            continue
        children = list(parent._modules.items())
        for (_, first), (_, between), (key, last) in zip(
            children, children[1:], children[2:], strict=False
        ):
            name = f"{prefix}.{key}" if prefix else key
            if not isinstance(between, FusedReLU) or not _poolable(first, last, counts):
                continue
            assert isinstance(first, norm.BatchNorm2d) and isinstance(last, nn.MaxPool2d)
            if exclusion.reason(name, last):
                continue
            first.pool = True
            parent._modules[key] = FusedMaxPool2d(last)
            rows.append(
                SparsifyRow(name, "MaxPool2d", (), 0.0, 0, "fused", "computed by the norm before")
            )
    return rows


def _poolable(first: nn.Module | None, last: nn.Module | None, counts: dict[int, int]) -> bool:
    return (
        isinstance(first, norm.BatchNorm2d)
        and type(last) is pooling.MaxPool2d
        and first.relu
        and not first.pool
        and pooling.halves(last)
        and counts[id(first)] == counts[id(last)] == 1
        and not (has_hooks(first) or has_hooks(last))
        and "forward" not in last.__dict__
    )


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
    """Undo ``fuse_pools``, ``fuse_relus`` and ``keep_layout`` in place; returns the model.

    A norm that includes a ReLU or pooling which nothing stands for (built so by hand) becomes
    nn.Sequential(norm, ...) with those after it.
    """
    relus, pools = _put_back(model)
    replaced: dict[int, nn.Module] = {}
    for module in list(model.modules()):
        plain = _PLAIN.get(type(module))
        if plain is None:
            continue
        after: list[nn.Module] = []
        if module.__dict__.pop("relu", False) and id(module) not in relus:
            after.append(nn.ReLU())
        if module.__dict__.pop("pool", False) and id(module) not in pools:
            after.append(nn.MaxPool2d(2))
        module.__class__ = plain
        if after:
            replaced[id(module)] = nn.Sequential(module, *after).train(module.training)
    swap_children(model, replaced)
    return replaced.get(id(model), model)


def _put_back(model: nn.Module) -> tuple[set[int], set[int]]:
    """Put the originals where _Fused modules stand; ids of the norms that included them."""
    relus: set[int] = set()
    pools: set[int] = set()
    for parent in list(model.modules()):
        last_norm: nn.Module | None = None
        for key, child in list(parent._modules.items()):
            if isinstance(child, _Fused) and last_norm is not None:
                parent._modules[key] = child.original.train(child.training)
                (pools if isinstance(child, FusedMaxPool2d) else relus).add(id(last_norm))
            else:
                last_norm = child if isinstance(child, norm._FeatureMajorNorm) else None
    return relus, pools


def swap_children(model: nn.Module, replaced: dict[int, nn.Module]) -> None:
    """Put ``replaced[id(child)]`` wherever ``child`` is registered below ``model``."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is not None and id(child) in replaced:
                parent._modules[key] = replaced[id(child)]
