"""One whole mask update against the definition in plain Python, from random weights and momenta.

The states are drawn so that the odd cases are frequent: ties, empty layers, full layers, layers
under the 0.2 of sparsity where the rate is limited, one layer that wants nearly everything.
"""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import pytest
import torch

from sparse_kernels.training import rules
from sparse_kernels.training.rules import LayerState
from sparse_kernels.training.update import RuleSet, plan_update

PAPER = RuleSet(rules.prune_magnitude, rules.grow_largest, rules.importance_momentum)
TRIALS = range(120)


class Layer:
    """Weights, momenta and mask of one layer as Python lists over all of its places."""

    def __init__(self, draw: random.Random, name: str) -> None:
        self.name, self.size = name, draw.randrange(1, 90)
        kind = draw.choice(["sparse", "sparse", "nearly full", "full", "empty"])
        shares = {"sparse": draw.random(), "nearly full": 0.85, "full": 1.0, "empty": 0.0}
        stored = round(shares[kind] * self.size)
        self.mask = sorted(draw.sample(range(self.size), stored))
        scale = draw.choice([1e-3, 1.0, 1.0, 100.0])
        # Multiples of 1/4 tie often, and their sums are exact.
        self.momentum = [scale * draw.randrange(-8, 9) / 4 for _ in range(self.size)]
        self.weight = [draw.randrange(-8, 9) / 4 for _ in range(self.size)]

    def state(self) -> LayerState:
        keys = torch.tensor(self.mask, dtype=torch.int64)

        def at(numbers: list[float]) -> torch.Tensor:
            return torch.tensor([numbers[i] for i in self.mask], dtype=torch.float64).view(-1, 1, 1)

        ones = torch.ones_like(keys)
        return LayerState(self.name, keys, at(self.weight), at(self.momentum), ones, self.size)

    def scores(self) -> torch.Tensor:
        return torch.tensor([abs(m) for m in self.momentum], dtype=torch.float64)


def drawn(trial: int) -> tuple[list[Layer], float]:
    draw = random.Random(trial)
    layers = [Layer(draw, f"layer {i}") for i in range(draw.randrange(1, 6))]
    return layers, draw.choice([0.0, 0.005, 0.2, 0.5, 0.5, 1.0])


def planned(layers: list[Layer], rate: float, rule_set: RuleSet = PAPER):
    generator = torch.Generator().manual_seed(0)
    scores = [layer.scores for layer in layers]
    states = [layer.state() for layer in layers]
    return plan_update(states, scores, rule_set, rate, generator, step=1)


def exact_shares(layers: list[Layer]) -> list[Fraction]:
    """r_l: mean |M| over the stored weights, normalised; without any momentum, the stored share."""
    means = []
    for layer in layers:
        sums = [abs(Fraction(layer.momentum[i])) for i in layer.mask]
        means.append(sum(sums, Fraction(0)) / len(sums) if sums else Fraction(0))
    if not any(means):
        means = [Fraction(len(layer.mask)) for layer in layers]
    total = sum(means, Fraction(0))
    return [m / total if total else Fraction(0) for m in means]


def lost(layers: list[Layer], rate: float) -> list[int]:
    """Weights that each layer prunes, with the rate that a nearly full, wanted layer is given."""
    counts = []
    for layer, share in zip(layers, exact_shares(layers), strict=True):
        stored, sparsity = len(layer.mask), 1.0 - len(layer.mask) / layer.size
        wanted = sparsity < 0.2 and float(share) > 1 / len(layers)
        counts.append(math.ceil((min(sparsity, rate) if wanted else rate) * stored))
    return counts


def kept_and_free(layer: Layer, count: int) -> tuple[set[int], list[int]]:
    """Survivors of the `count` smallest |w|, and the free places, those just pruned included."""
    order = sorted(layer.mask, key=lambda i: (abs(layer.weight[i]), i))
    kept = set(order[count:])
    return kept, [i for i in range(layer.size) if i not in kept]


@pytest.mark.parametrize("trial", TRIALS)
def test_the_smallest_go_and_the_largest_momenta_come(trial) -> None:
    layers, rate = drawn(trial)
    changes = planned(layers, rate)
    for layer, change, count in zip(layers, changes, lost(layers, rate), strict=True):
        kept, free = kept_and_free(layer, count)
        after = set(change.keys.tolist())
        assert change.removed == count and kept <= after
        grown = len(after) - len(kept)
        best = sorted(free, key=lambda i: (-abs(layer.momentum[i]), i))[:grown]
        assert after == kept | set(best)
        assert change.keys.tolist() == sorted(after)
        assert set(change.added.tolist()) == after - set(layer.mask)


@pytest.mark.parametrize("trial", TRIALS)
def test_the_total_is_exact_and_no_layer_is_filled_above_its_cap(trial) -> None:
    layers, rate = drawn(trial)
    changes, removed = planned(layers, rate), lost(layers, rate)
    before, after = [len(x.mask) for x in layers], [c.keys.numel() for c in changes]
    assert sum(after) == sum(before)
    free = [x.size - n + k for x, n, k in zip(layers, before, removed, strict=True)]
    caps = [math.floor(0.99 * f) for f in free]
    grown = [a - b + k for a, b, k in zip(after, before, removed, strict=True)]
    relaxed = sum(caps) < sum(removed)
    limits = free if relaxed else caps
    assert all(0 <= g <= limit for g, limit in zip(grown, limits, strict=True))


@pytest.mark.parametrize("trial", TRIALS)
def test_what_a_layer_regrows_is_its_share_of_mean_momentum(trial) -> None:
    """A layer below its cap gets at least its share, and all of those get the same more."""
    layers, rate = drawn(trial)
    changes, removed = planned(layers, rate), lost(layers, rate)
    total = sum(removed)
    excess = []
    for layer, change, count, share in zip(
        layers, changes, removed, exact_shares(layers), strict=True
    ):
        grown = change.keys.numel() - len(layer.mask) + count
        free = layer.size - len(layer.mask) + count
        if grown < math.floor(0.99 * free):
            excess.append(float(grown - share * total))
    # Whole numbers: each is within one of the exact value, and so two of them within two.
    assert all(e > -1 - 1e-6 for e in excess)
    assert all(abs(a - b) < 2 + 1e-6 for a, b in itertools.combinations(excess, 2))


@pytest.mark.parametrize("trial", range(0, 120, 3))
def test_without_redistribution_each_layer_keeps_its_number(trial) -> None:
    layers, rate = drawn(trial)
    changes = planned(layers, rate, RuleSet(rules.prune_magnitude, rules.grow_largest, None))
    assert [c.keys.numel() for c in changes] == [len(x.mask) for x in layers]
    assert [c.removed for c in changes] == lost(layers, rate)


def test_the_draws_contain_the_odd_cases() -> None:
    """Otherwise the properties above would hold for want of anything to break them."""
    seen = {"tie": 0, "limited": 0, "capped": 0, "regrown": 0, "redistributed": 0, "empty": 0}
    for trial in TRIALS:
        layers, rate = drawn(trial)
        changes, removed = planned(layers, rate), lost(layers, rate)
        for layer, change, count in zip(layers, changes, removed, strict=True):
            stored = len(layer.mask)
            kept, free = kept_and_free(layer, count)
            grown = change.keys.numel() - len(kept)
            sizes = sorted(abs(layer.weight[i]) for i in layer.mask)
            seen["tie"] += 0 < count < stored and sizes[count - 1] == sizes[count]
            seen["limited"] += count < math.ceil(rate * stored)
            seen["capped"] += 0 < grown == math.floor(0.99 * len(free)) < len(free)
            seen["regrown"] += bool((set(layer.mask) - kept) & set(change.keys.tolist()))
            seen["redistributed"] += grown != count
            seen["empty"] += stored == 0
    assert min(seen.values()) >= 10, seen
