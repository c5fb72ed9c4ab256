"""Cost-aware redistribution: exact totals, a budget never exceeded, the paper's where it is not."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch
from small_training import batches, make_model, sparse, stored
from torch import nn

from sparse_kernels import SparseMomentum, sparsify
from sparse_kernels.training import flops_per_weight, rules, time_per_weight
from sparse_kernels.training.budget import redistribute_within, total_cost, weighed

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(trial: int):
    draw = random.Random(trial)
    layers = draw.randrange(1, 7)
    free = [draw.choice([0, 1, draw.randrange(300), draw.randrange(300)]) for _ in range(layers)]
    total = draw.randrange(sum(free) + 1)
    shares = [draw.choice([0.0, draw.random(), draw.random(), 1.0]) for _ in range(layers)]
    shares = [s / sum(shares) for s in shares] if sum(shares) else [0.0] * layers
    costs = [Fraction(draw.choice([1.0, 2.0, 1024.0, draw.random() + 1e-3])) for _ in range(layers)]
    return draw, total, shares, free, costs


def extremes(total, free, costs):
    """The least and the most that `total` blocks can cost."""
    found = []
    for order in (sorted, lambda c: sorted(c, reverse=True)):
        left, cost = total, Fraction(0)
        for c, f in order(zip(costs, free, strict=True)):
            cost += min(left, f) * c
            left -= min(left, f)
        found.append(cost)
    return found


@pytest.mark.parametrize("trial", range(150))
def test_the_total_is_exact_and_the_budget_never_exceeded(trial) -> None:
    draw, total, shares, free, costs = drawn(trial)
    least, most = extremes(total, free, costs)
    allowance = least + (most - least) * Fraction(draw.choice([0.0, draw.random(), 0.01, 1.0]))
    power = draw.choice([0.0, 0.5, 1.0, 3.0])
    counts = redistribute_within(total, shares, free, costs, allowance, power)
    assert sum(counts) == total
    assert all(0 <= c <= f for c, f in zip(counts, free, strict=True))
    assert total_cost(counts, costs) <= allowance
    plain = redistribute_within(total, shares, free, costs, None, power)
    if total_cost(plain, costs) <= allowance:
        assert counts == plain  # the budget changes nothing that it allows
    else:  # and is used up but for less than a block of the dearest layer
        assert allowance - total_cost(counts, costs) < max(costs)


@pytest.mark.parametrize("trial", range(0, 150, 2))
def test_without_power_and_budget_it_is_the_papers(trial) -> None:
    _, total, shares, free, costs = drawn(trial)
    counts = redistribute_within(total, shares, free, costs, None)
    assert counts == rules.redistribute(total, shares, free)


def test_the_draws_bind_and_do_not_bind() -> None:
    bound = 0
    for trial in range(150):
        draw, total, shares, free, costs = drawn(trial)
        least, most = extremes(total, free, costs)
        allowance = least + (most - least) * Fraction(draw.choice([0.0, draw.random(), 0.01, 1.0]))
        plain = redistribute_within(total, shares, free, costs, None)
        bound += total_cost(plain, costs) > allowance
    assert 30 < bound < 120, bound


def test_importance_is_divided_by_a_power_of_the_cost() -> None:
    costs = [Fraction(1), Fraction(4)]
    assert weighed([0.5, 0.5], costs, 1.0) == pytest.approx([0.8, 0.2])
    assert weighed([0.2, 0.8], costs, 0.5) == pytest.approx([1 / 3, 2 / 3])
    assert weighed([0.0, 1.0], costs, 60.0) == [0.0, 1.0]
    assert weighed([0.0, 0.0], costs, 1.0) == [0.0, 0.0]
    assert redistribute_within(10, [0.5, 0.5], [99, 99], costs, None, 1.0) == [8, 2]
    # 5 and 5 cost 25; at most 17 are left for a dear one less or two: 8 and 2 cost 16.
    assert redistribute_within(10, [0.5, 0.5], [99, 99], costs, Fraction(17)) == [8, 2]
    with pytest.raises(ValueError, match="cheapest free places cost 10; raise cost_budget"):
        redistribute_within(10, [0.5, 0.5], [99, 99], costs, Fraction(9))


# ---- in training -------------------------------------------------------------------------------

COSTS = {"0": 0.25, "2": 3.0, "4": 50.0}  # momentum wants the last


def trained(options, cost=COSTS, block=(1, 1), density=0.3):
    model = make_model(block=block, density=density, sizes=(12, 16, 10, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"signal": "exact", **options}
    masks = SparseMomentum(
        model, optimizer, total_steps=25, update_every=3, cost=cost, dense_above=1.0, **options
    )
    total, seen = stored(model), []

    def spent() -> Fraction:
        named = zip(COSTS, sparse(model), strict=True)
        return sum((Fraction(COSTS[k]) * x.pattern.nnzb for k, x in named), Fraction(0))

    seen.append(spent())
    for x, y in batches(25):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        if masks.step() is not None:
            assert stored(model) == total
            seen.append(spent())
    return model, masks, seen


@pytest.mark.parametrize("block", [(1, 1), (2, 2)])
def test_a_training_never_costs_more_than_its_first_pattern(block) -> None:
    free = trained({}, cost=None, block=block)[2]
    assert max(free) > free[0], "the paper's redistribution spends more, or this shows nothing"
    _, masks, held = trained({"cost_budget": "start"}, block=block)
    assert len(held) == 9 and max(held) == held[0]
    moved = {name: masks.history[-1].nnz_after[name] for name in COSTS}
    assert moved != masks.history[0].nnz_before, "a budget must not stop redistribution"


def test_a_share_of_the_cost_is_of_the_weights_inside_the_matrix() -> None:
    """Blocks of 4 rows reach beyond a matrix of 10; stored ones count as whole, all as they are."""
    share = Fraction(1, 2)
    model, _, held = trained({"cost_budget": 0.5, "redistribution": "momentum"}, block=(4, 1))
    shapes = [layer.matrix_shape for layer in sparse(model)]
    costs = [Fraction(cost) for cost in COSTS.values()]
    assert any(rows % 4 for rows, _ in shapes)
    dense = sum(c * rows * cols for c, (rows, cols) in zip(costs, shapes, strict=True))
    assert max(held) * 4 <= share * dense
    assert sum(c * x.nnz for c, x in zip(costs, sparse(model), strict=True)) <= max(held) * 4


def test_no_weight_and_no_budget_is_the_papers_training() -> None:
    model, _, _ = trained({"cost_weight": 0.0})
    plain, _, _ = trained({}, cost=None)
    for a, b in zip(sparse(model), sparse(plain), strict=True):
        assert torch.equal(a.pattern.keys(), b.pattern.keys())
        assert torch.equal(a.values, b.values)


def test_a_cost_weight_spends_less() -> None:
    assert sum(trained({"cost_weight": 1.0})[2]) < sum(trained({}, cost=None)[2])


def test_a_budget_below_the_pattern_and_costs_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="above cost_budget=0.2; start sparser"):
        trained({"cost_budget": 0.2})
    with pytest.raises(ValueError, match="pass cost=flops_per_weight"):
        trained({"cost_weight": 1.0}, cost=None)
    with pytest.raises(ValueError, match=r"missing: \['4'\]"):
        trained({"cost_weight": 1.0}, cost={"0": 1.0, "2": 1.0})
    with pytest.raises(ValueError, match="'2' must be above 0"):
        trained({"cost_weight": 1.0}, cost={**COSTS, "2": 0.0})
    with pytest.raises(ValueError, match="cost_budget must be in"):
        trained({"cost_budget": 5.0})


def test_costs_of_weights_by_count_and_by_clock() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.Flatten(), nn.Linear(72, 10),
    )  # fmt: skip
    sparsify(model, density=0.5, generator=torch.Generator().manual_seed(0))
    example = torch.randn(2, 3, 16, 16)
    assert flops_per_weight(model, example) == {"0": 512.0, "3": 18.0, "5": 2.0}
    assert model.training
    times = time_per_weight(model, example, repeats=2)
    assert list(times) == ["0", "3", "5"] and all(0 < t < math.inf for t in times.values())
    model[0].requires_grad_(False)  # then nothing of it is differentiated
    assert all(0 < t < math.inf for t in time_per_weight(model, example, repeats=2).values())
    with pytest.raises(ValueError, match=r"did not reach \['5'\]"):
        model.forward = lambda x: model[3](model[0](x))
        flops_per_weight(model, torch.randn(2, 3, 8, 8))
