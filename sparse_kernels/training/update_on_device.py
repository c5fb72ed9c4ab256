"""plan_update (update.py) where the host must not wait: one copy to it for all layers.

With the named rules but for "set" and "global_magnitude" (which read how many weights of a sign, or
of a layer, go) and growth drawn by a generator on the GPU. Rules of the user's own are checked as
on the CPU, which reads too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import device, rules
from .rules import GrowthRule, LayerState
from .scores import Scores, candidates
from .scores import numbers as numbers_of
from .update import (
    LayerChange,
    RuleSet,
    check_growth,
    check_masks,
    classes_of,
    lose,
    not_finite,
    regain,
)

_TRUSTED_GROWTH = (rules.grow_largest, rules.grow_random)


def plan_update(
    states: Sequence[LayerState],
    scores: Sequence[Callable[[], Scores]],
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
    checks = [
        _check_numbers(state, numbers_of(found)) for state, found in zip(states, held, strict=True)
    ]
    numbers = device.read_numbers([*checks, *raw])
    _check_finite(states, numbers[: len(states)], step)
    pruned: dict[int, Tensor] = {}
    removed: dict[int, int] = {}
    regrow: dict[int, int] = {}
    slack = None if rule_set.costs is None else rule_set.costs.slack(states)
    for members, found in zip(classes, numbers[len(states) :], strict=True):
        layers = [states[i] for i in members]
        shares = rules.normalise(found, [s.nnz for s in layers])
        masks, lost = _prune(layers, shares, rule_set, prune_rate)
        grown, slack = regain(layers, lost, shares, rule_set, slack)
        pruned.update(zip(members, masks, strict=True))
        removed.update(zip(members, lost, strict=True))
        regrow.update(zip(members, grown, strict=True))
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


def _prune(
    states: Sequence[LayerState], shares: list[float], rule_set: RuleSet, prune_rate: float
) -> tuple[Sequence[Tensor], list[int]]:
    """Pruned masks and blocks lost per layer, for layers of one block shape."""
    counts = lose(states, shares, rule_set, prune_rate)
    pruned = rule_set.prune(states, counts)
    check_masks(states, pruned)
    if rule_set.prune is rules.prune_magnitude:
        return pruned, counts
    sums = [mask.sum().reshape(1) for mask in pruned]
    return pruned, [int(number) for (number,) in device.read_numbers(sums)]


def _grow(
    state: LayerState,
    pruned: Tensor,
    removed: int,
    count: int,
    scores: Scores,
    growth: GrowthRule,
    generator: torch.Generator | None,
) -> LayerChange:
    kept = state.keys[device.positions(~pruned, state.nnz - removed)]
    places = candidates(state, kept, scores, growth, generator)
    grown = growth(places, count)
    keys = torch.cat([kept, grown.to(kept.device)]).sort().values
    if growth not in _TRUSTED_GROWTH:
        check_growth(state, grown, count, keys)
    return LayerChange(keys=keys, added=None, removed=removed)
