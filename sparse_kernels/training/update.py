"""One mask update, planned: which blocks each layer keeps and grows. Nothing is changed here.

update_on_device.py plans the same where the values live on a device that works through a queue.

Layers with different block shapes share no budget: the number of blocks is conserved per block
shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

from . import rules
from .budget import Costs, redistribute_within, total_cost
from .rewrite import added_mask
from .rules import GrowthRule, LayerState, PruneRule, RedistributionRule
from .scores import Scores, candidates, numbers


@dataclass(frozen=True)
class RuleSet:
    """The three rules of an update; redistribution None lets every layer regrow what it lost.

    shrink: blocks, by layer, that are lost for good (gradual pruning); layers not named lose none.
    costs: what weights cost and may cost; None: nothing.
    spare_dense: nearly dense layers of importance lose less (rules.prune_counts).
    """

    prune: PruneRule
    growth: GrowthRule
    redistribution: RedistributionRule | None
    shrink: Mapping[str, int] = field(default_factory=dict)
    costs: Costs | None = None
    spare_dense: bool = True


@dataclass(frozen=True)
class LayerChange:
    """Planned change of one layer."""

    keys: Tensor  # int64 [new], ascending
    # int64 [added], ascending, not stored before; None where the host does not know how many
    added: Tensor | None
    removed: int  # blocks pruned, regrown ones included


@dataclass(frozen=True)
class UpdateRecord:
    """What one update did; per-layer dicts are keyed by the layer's name."""

    step: int
    prune_rate: float
    removed: int  # blocks pruned in all layers, those regrown at once included
    nnz_before: dict[str, int]  # stored blocks
    nnz_after: dict[str, int]
    density_after: dict[str, float]  # matrix elements stored / matrix elements
    storage_changes: dict[str, str] = field(
        default_factory=dict
    )  # layers that moved, with their new storage
    reallocated: tuple[str, ...] = ()  # layers whose tensors were newly allocated
    seconds: float = 0.0  # wall-clock time of the update


def check_finite(states: Sequence[LayerState], step: int) -> None:
    """Raise FloatingPointError naming the first layer with a non-finite weight or momentum (one
    sync).
    """
    if not states:
        return
    sums = [torch.stack([s.values.double().sum(), s.momentum.double().sum()]) for s in states]
    for state, (weight, momentum) in zip(states, torch.stack(sums).tolist(), strict=True):
        if not math.isfinite(weight) or not math.isfinite(momentum):
            what = "weight" if not math.isfinite(weight) else "momentum"
            raise FloatingPointError(not_finite(what, state.name, step))


def not_finite(what: str, layer: str, step: int) -> str:
    """The message for a layer whose ``what`` is not finite."""
    return (
        f"layer {layer!r}: non-finite {what} at the mask update after step {step}; training has "
        "diverged. Lower the learning rate, clip the gradient or look for NaN in the data; the "
        "mask was not changed"
    )


def plan_update(
    states: Sequence[LayerState],
    scores: Sequence[Callable[[], Scores]],
    rule_set: RuleSet,
    prune_rate: float,
    generator: torch.Generator | None,
    step: int,
) -> list[LayerChange]:
    """Plan the change of every layer.

    scores: per layer a function that gives the signal's mean magnitude of every block, [blocks] >=
    0 (or None, or those of a sample): called one layer at a time, so that only one such vector
    lives at once.
    Raises FloatingPointError for non-finite momentum, weight or signal, ValueError if a rule
    returns something that is not what its signature says.
    """
    check_finite(states, step)
    pruned: dict[int, Tensor] = {}
    regrow: dict[int, int] = {}
    slack = None if rule_set.costs is None else rule_set.costs.slack(states)
    for members in classes_of(states):
        layers = [states[i] for i in members]
        masks, counts, slack = _prune_and_share(layers, rule_set, prune_rate, slack)
        pruned.update(zip(members, masks, strict=True))
        regrow.update(zip(members, counts, strict=True))
    return [
        _grow(state, pruned[i], regrow[i], scores[i], rule_set.growth, generator, step)
        for i, state in enumerate(states)
    ]


def classes_of(states: Sequence[LayerState]) -> list[list[int]]:
    """Places of the layers by block shape: each class has a budget of its own."""
    classes: dict[tuple[int, ...], list[int]] = {}
    for i, state in enumerate(states):
        classes.setdefault(tuple(state.values.shape[1:]), []).append(i)
    return list(classes.values())


def check_masks(states: Sequence[LayerState], pruned: Sequence[Tensor]) -> None:
    """Raise ValueError for what a prune rule returned that is not what its signature says."""
    for state, mask in zip(states, pruned, strict=True):
        if mask.dtype != torch.bool or mask.shape != state.keys.shape:
            raise ValueError(
                f"layer {state.name!r}: the prune rule must return bool [{state.nnz}], got "
                f"{mask.dtype} {tuple(mask.shape)}"
            )


def lose(
    states: Sequence[LayerState], shares: Sequence[float], rule_set: RuleSet, prune_rate: float
) -> list[int]:
    """Blocks that each layer is asked to lose: by the prune rate, and what is not to come back."""
    nnz, blocks = [s.nnz for s in states], [s.blocks for s in states]
    counts = rules.prune_counts(nnz, blocks, shares, prune_rate, rule_set.spare_dense)
    gone = [rule_set.shrink.get(state.name, 0) for state in states]
    return [min(n, k + g) for n, k, g in zip(nnz, counts, gone, strict=True)]


def regain(
    states: Sequence[LayerState],
    removed: Sequence[int],
    shares: Sequence[float],
    rule_set: RuleSet,
    slack: Fraction | None,
) -> tuple[list[int], Fraction | None]:
    """Blocks that each layer grows, and what then is left of the budget (None: there is none).

    removed: blocks pruned; slack: what the budget has left beside all blocks before the update.
    """
    gone = [rule_set.shrink.get(state.name, 0) for state in states]
    total = max(0, sum(removed) - sum(gone))
    if rule_set.redistribution is not None:
        if rule_set.redistribution is rules.importance_survivors:
            left = [s.nnz - r for s, r in zip(states, removed, strict=True)]
            shares = rules.normalise(left, left)
        free = [s.blocks - s.nnz + r for s, r in zip(states, removed, strict=True)]
        if rule_set.costs is None:
            return rules.redistribute(total, shares, free), None
        costs = rule_set.costs.of(states)
        allowance = None if slack is None else slack + total_cost(removed, costs)
        power = rule_set.costs.power
        grown = redistribute_within(total, shares, free, costs, allowance, power)
        return grown, None if allowance is None else allowance - total_cost(grown, costs)
    grown = [r - g for r, g in zip(removed, gone, strict=True)]
    if any(g < 0 for g in grown):  # pruned globally: some layers lose less than is asked of them
        own = [r / sum(removed) for r in removed] if total else [0.0] * len(removed)
        grown = rules.redistribute(total, own, removed, cap=1.0)
    return grown, slack


def _prune_and_share(
    states: Sequence[LayerState], rule_set: RuleSet, prune_rate: float, slack: Fraction | None
) -> tuple[Sequence[Tensor], list[int], Fraction | None]:
    """Pruned blocks and regrowth per layer, for layers of one block shape; the budget's rest."""
    # Without redistribution the importance may still limit the prune rate of nearly dense layers.
    importance = (rule_set.redistribution or rules.importance_momentum)(states)
    shares = rules.normalise(importance, [s.nnz for s in states])
    pruned = rule_set.prune(states, lose(states, shares, rule_set, prune_rate))
    check_masks(states, pruned)
    removed = torch.stack([mask.sum() for mask in pruned]).tolist()
    return pruned, *regain(states, removed, shares, rule_set, slack)


def _grow(
    state: LayerState,
    pruned: Tensor,
    count: int,
    scores_of: Callable[[], Scores],
    growth: GrowthRule,
    generator: torch.Generator | None,
    step: int,
) -> LayerChange:
    kept = state.keys[~pruned]
    found = scores_of()
    scores = numbers(found)
    # Scores are >= 0, and a maximum hands NaN on: one pass, no sum that could overflow.
    if scores is not None and scores.numel() and not math.isfinite(float(scores.max())):
        raise FloatingPointError(not_finite("growth signal", state.name, step))
    places = candidates(state, kept, found, growth, generator)
    grown = growth(places, count)
    keys = torch.cat([kept, grown.to(kept.device)]).sort().values
    check_growth(state, grown, count, keys)
    return LayerChange(
        keys=keys, added=keys[added_mask(state.keys, keys)], removed=state.nnz - kept.numel()
    )


def check_growth(state: LayerState, grown: Tensor, count: int, keys: Tensor) -> None:
    """A rule that grows a stored block or one block twice would lose weights of the budget."""
    in_range = keys.numel() == 0 or (int(keys[0]) >= 0 and int(keys[-1]) < state.blocks)
    distinct = bool((keys[1:] > keys[:-1]).all())
    if grown.dtype != torch.int64 or grown.shape != (count,) or not in_range or not distinct:
        raise ValueError(
            f"layer {state.name!r}: the growth rule must return int64 [{count}] distinct free keys "
            f"in [0, {state.blocks}), got {grown.dtype} {tuple(grown.shape)}"
            f"{'' if in_range else ' with keys out of range'}"
            f"{'' if distinct else ' with keys that are repeated or already stored'}"
        )
