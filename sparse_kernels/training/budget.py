"""Redistribution that knows what a weight costs, under a budget that is never exceeded.

Importance is divided by cost**power. Where the regrowth that follows costs more than it may, the
power is raised until it does not: the dearer a layer, the more it yields, in the order of its
importance for what it costs. Pure functions over integers and exact fractions.

Method: this project's. With power 0 and no budget it is the paper's redistribution, to the block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from .rules import FREE_SHARE, LayerState, redistribute

_STEEPEST = 64.0
"""Powers above it change nothing any more: 64 halvings where one layer costs twice the other."""
_HALVINGS = 40


@dataclass(frozen=True)
class Costs:
    """What weights cost and may cost. budget: for all layers of an update together, None: free."""

    per_block: Mapping[str, float]  # by layer, > 0: cost of one block in a unit of the caller's
    power: float = 0.0
    budget: Fraction | None = None

    def of(self, states: Sequence[LayerState]) -> list[Fraction]:
        """Exact cost of one block of each layer."""
        return [Fraction(self.per_block[state.name]) for state in states]

    def slack(self, states: Sequence[LayerState]) -> Fraction | None:
        """What the budget leaves beside all stored blocks; None without a budget."""
        if self.budget is None:
            return None
        return self.budget - total_cost([s.nnz for s in states], self.of(states))


def total_cost(counts: Sequence[int], costs: Sequence[Fraction]) -> Fraction:
    """Sum of counts[l] * costs[l]."""
    return sum((n * c for n, c in zip(counts, costs, strict=True)), Fraction(0))


def weighed(shares: Sequence[float], costs: Sequence[Fraction], power: float) -> list[float]:
    """shares[l] / costs[l]**power, normalised to sum 1; zeros stay zeros. `power` 0: unchanged."""
    if power == 0:
        return list(shares)
    # Of logarithms: a power of a ratio of costs leaves the range of floats soon.
    logs = [
        math.log(s) - power * math.log(c) if s > 0 else -math.inf
        for s, c in zip(shares, costs, strict=True)
    ]
    largest = max(logs, default=-math.inf)
    if largest == -math.inf:
        return list(shares)
    raw = [math.exp(x - largest) for x in logs]
    total = math.fsum(raw)
    return [x / total for x in raw]


def redistribute_within(
    total: int,
    shares: Sequence[float],
    free: Sequence[int],
    costs: Sequence[Fraction],
    allowance: Fraction | None,
    power: float = 0.0,
    cap: float = FREE_SHARE,
) -> list[int]:
    """Integer regrowth per layer that sums to exactly `total` and costs at most `allowance`.

    shares, free, cap: as for `rules.redistribute`. costs: > 0, of one block of each layer.
    If the shares over cost**power are affordable they are taken. Else the power is raised to where
    they just are, and single blocks then move back towards the dearer layers: what is left of the
    allowance is less than the cost of one block of the dearest layer. If importance alone cannot
    be afforded at any power, cheap layers are filled up as far as needed; the cap is relaxed to
    all free places if nothing else helps.
    Raises ValueError if even the cheapest places cost more than the allowance.
    """

    def at(exponent: float) -> list[int]:
        return redistribute(total, weighed(shares, costs, exponent), free, cap)

    def affordable(counts: Sequence[int]) -> bool:
        return allowance is None or total_cost(counts, costs) <= allowance

    wanted = at(power)
    if affordable(wanted):
        return wanted
    assert allowance is not None
    low, high = power, power + _STEEPEST
    found = at(high)
    if not affordable(found):
        wanted, found = found, _cheapest(total, free, costs, allowance, cap)
        return _towards(found, wanted, costs, allowance)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        counts = at(middle)
        if affordable(counts):
            high, found = middle, counts
        else:
            low, wanted = middle, counts
    return _towards(found, wanted, costs, allowance)


def _cheapest(
    total: int,
    free: Sequence[int],
    costs: Sequence[Fraction],
    allowance: Fraction,
    cap: float,
) -> list[int]:
    """The cheapest `total` places, within the caps if those can be afforded."""
    counts: list[int] = []
    for caps in ([math.floor(cap * f) for f in free], list(free)):
        left, counts = total, [0] * len(free)
        for i in sorted(range(len(free)), key=lambda i: (costs[i], i)):
            counts[i] = min(left, caps[i])
            left -= counts[i]
        if left == 0 and total_cost(counts, costs) <= allowance:
            return counts
    raise ValueError(
        f"cannot regrow {total} blocks for a cost of at most {float(allowance):g}: the cheapest "
        f"free places cost {float(total_cost(counts, costs)):g}; raise cost_budget, or start from "
        "a pattern that costs no more than it"
    )


def _towards(
    found: Sequence[int], wanted: Sequence[int], costs: Sequence[Fraction], allowance: Fraction
) -> list[int]:
    """Move blocks of the affordable `found` to where the unaffordable `wanted` has more.

    Ends when no single move is affordable: less is left than the difference of two layers' costs.
    """
    counts = list(found)
    left = allowance - total_cost(counts, costs)
    gains = sorted(
        (i for i in range(len(counts)) if wanted[i] > counts[i]),
        key=lambda i: (counts[i] - wanted[i], i),
    )
    losses = sorted(
        (i for i in range(len(counts)) if wanted[i] < counts[i]), key=lambda i: costs[i]
    )
    # Moves that save first: they pay for others.
    pairs = sorted(((i, j) for i in gains for j in losses), key=lambda p: costs[p[0]] > costs[p[1]])
    for i, j in pairs:
        price = costs[i] - costs[j]
        number = min(wanted[i] - counts[i], counts[j] - wanted[j])
        if price > 0:
            number = min(number, math.floor(left / price))
        counts[i] += number
        counts[j] -= number
        left -= number * price
    return counts
