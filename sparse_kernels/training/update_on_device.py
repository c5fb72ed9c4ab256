"""plan_update (update.py) where the host must not wait: one copy to it for all layers.

With the named rules but for "set" and "global_magnitude" (which read how many weights of a sign, or
of a layer, go) and growth drawn by a generator on the GPU. Rules of the user's own are checked as
on the CPU, which reads too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sparse_kernels.backends import cuda_pattern

from . import device, rules
from .rules import Candidates, GrowthRule, LayerState
from .update import (
    LayerChange,
    RuleSet,
    check_growth,
    check_masks,
    classes_of,
    not_finite,
)

_TRUSTED_GROWTH = (rules.grow_largest, rules.grow_random)


def plan_update(
    states: Sequence[LayerState],
    scores: Sequence[Callable[[], Tensor | None]],
    rule_set: RuleSet,
    prune_rate: float,
    generator: torch.Generator | None,
    step: int,
) -> list[LayerChange]:
    """As update.plan_update, to the last bit; ``added`` of every change is None.

    The scores of all layers live at once, since their maxima are in the one copy.
    """
    if not states:
        return []
    held = [of() for of in scores]
    classes = classes_of(states)
    importance = rule_set.redistribution or rules.importance_momentum
    raw = [importance([states[i] for i in members]) for members in classes]
    checks = [_check_numbers(state, found) for state, found in zip(states, held, strict=True)]
    numbers = device.read_numbers([*checks, *raw])
    _check_finite(states, numbers[: len(states)], step)
    pruned: dict[int, Tensor] = {}
    removed: dict[int, int] = {}
    regrow: dict[int, int] = {}
    for members, found in zip(classes, numbers[len(states) :], strict=True):
        layers = [states[i] for i in members]
        masks, lost, grown = _prune_and_share(layers, found, rule_set, prune_rate)
        pruned.update(zip(members, masks, strict=True))
        removed.update(zip(members, lost, strict=True))
        regrow.update(zip(members, grown, strict=True))
    if rule_set.growth is rules.grow_largest and cuda_pattern.takes_scores(held):
        return _grow_together(states, pruned, removed, regrow, held)
    return [
        _grow(state, pruned[i], removed[i], regrow[i], held[i], rule_set.growth, generator)
        for i, state in enumerate(states)
    ]


def _check_numbers(state: LayerState, scores: Tensor | None) -> Tensor:
    """Float64 [3] that are finite if weights, momentum and signal are."""
    weight, momentum = (t.sum(dtype=torch.float64) for t in (state.values, state.momentum))
    empty = scores is None or scores.numel() == 0
    signal = torch.zeros_like(weight) if empty else scores.amax().double()  # type: ignore[union-attr]
    return torch.stack([weight, momentum, signal])


def _check_finite(states: Sequence[LayerState], numbers: list[list[float]], step: int) -> None:
    """As update.check_finite, weights and momenta of all layers before signals."""
    for what in (("weight", "momentum"), ("growth signal",)):
        places = (0, 1) if len(what) == 2 else (2,)
        for state, row in zip(states, numbers, strict=True):
            for name, place in zip(what, places, strict=True):
                if not math.isfinite(row[place]):
                    raise FloatingPointError(not_finite(name, state.name, step))


def _prune_and_share(
    states: Sequence[LayerState], importance: list[float], rule_set: RuleSet, prune_rate: float
) -> tuple[Sequence[Tensor], list[int], list[int]]:
    """Pruned masks, blocks lost and blocks regrown per layer, for layers of one block shape."""
    nnz, blocks = [s.nnz for s in states], [s.blocks for s in states]
    shares = rules.normalise(importance, nnz)
    counts = rules.prune_counts(nnz, blocks, shares, prune_rate)
    pruned = rule_set.prune(states, counts)
    check_masks(states, pruned)
    removed = counts
    if rule_set.prune is not rules.prune_magnitude:
        sums = [mask.sum().reshape(1) for mask in pruned]
        removed = [int(number) for (number,) in device.read_numbers(sums)]
    if rule_set.redistribution is None:
        return pruned, removed, removed
    free = [b - n + r for b, n, r in zip(blocks, nnz, removed, strict=True)]
    return pruned, removed, rules.redistribute(sum(removed), shares, free)


def _grow_together(
    states: Sequence[LayerState],
    pruned: Mapping[int, Tensor],
    removed: Mapping[int, int],
    regrow: Mapping[int, int],
    scores: Sequence[Tensor],
) -> list[LayerChange]:
    """_grow with the rule grow_largest, for all layers in a few launches of native kernels."""
    places = range(len(states))
    left = [state.nnz - removed[i] for i, state in enumerate(states)]
    keys = [state.keys for state in states]
    kept = cuda_pattern.keep_blocks([pruned[i] for i in places], keys, left, scores)
    grown = cuda_pattern.select_places(scores, [regrow[i] for i in places], largest=True)
    merged = cuda_pattern.merge_keys(kept, grown)
    return [LayerChange(keys=k, added=None, removed=removed[i]) for i, k in enumerate(merged)]


def _grow(
    state: LayerState,
    pruned: Tensor,
    removed: int,
    count: int,
    scores: Tensor | None,
    growth: GrowthRule,
    generator: torch.Generator | None,
) -> LayerChange:
    kept = state.keys[device.positions(~pruned, state.nnz - removed)]
    if scores is not None:
        scores.index_fill_(0, kept, -1.0)
    grown = growth(Candidates(state.name, kept, state.blocks, scores, generator), count)
    keys = torch.cat([kept, grown.to(kept.device)]).sort().values
    if growth not in _TRUSTED_GROWTH:
        check_growth(state, grown, count, keys)
    return LayerChange(keys=keys, added=None, removed=removed)
