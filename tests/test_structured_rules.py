"""Constant fan-in, N:M and growth by neuron against brute force; trainings that hold them."""

from __future__ import annotations

import random

import pytest
import torch
from small_training import make_model, sparse, stored, train

from sparse_kernels.training import SparseMomentum, method, rules
from sparse_kernels.training.blocks import BlockGrid
from sparse_kernels.training.rules import Candidates, LayerState
from sparse_kernels.training.structured import (
    GrowInGroups,
    PruneInGroups,
    arrange,
    group_size,
    grow_neurons,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(trial: int):
    """Rows, columns, stored keys, group size (None: a row) and a magnitude per place, with ties."""
    draw = random.Random(trial)
    rows, cols = draw.randrange(1, 6), draw.randrange(1, 12)
    keys = sorted(draw.sample(range(rows * cols), draw.randrange(rows * cols + 1)))
    size = draw.choice([None, 1, 2, 4, 40])
    return draw, rows, cols, keys, size, [draw.randrange(6) / 4 for _ in range(rows * cols)]


def group(key: int, cols: int, size: int | None) -> tuple[int, int]:
    return key // cols, 0 if size is None else key % cols // size


def prune_one(keys, scores, cols, size):
    """The definition, one block at a time: the smallest of the fullest groups."""
    fill = [sum(group(o, cols, size) == group(k, cols, size) for o in keys) for k in keys]
    fullest = [k for k, f in zip(keys, fill, strict=True) if f == max(fill)]
    return min(fullest, key=lambda k: (scores[k], k))


@pytest.mark.parametrize("trial", range(80))
def test_pruning_takes_the_smallest_of_the_fullest_groups(trial) -> None:
    draw, rows, cols, keys, size, scores = drawn(trial)
    count = draw.randrange(len(keys) + 1)
    values = torch.tensor([scores[k] for k in keys], dtype=torch.float64).view(-1, 1, 1)
    layer = LayerState(
        "x", torch.tensor(keys).long(), values, values, torch.ones(len(keys)), rows * cols, cols
    )
    mask = PruneInGroups(size)([layer], [count])[0]
    left = list(keys)
    for _ in range(count):
        left.remove(prune_one(left, scores, cols, size))
    kept = [k for k, gone in zip(keys, mask.tolist(), strict=True) if not gone]

    # Level by level the same; inside the last level magnitude decides, whatever the group.
    def fills(some):
        return sorted(sum(group(o, cols, size) == group(k, cols, size) for o in some) for k in some)

    assert len(kept) == len(left) and fills(kept) == fills(left)
    assert sum(scores[k] for k in kept) == pytest.approx(sum(scores[k] for k in left))
    for place in {group(k, cols, size) for k in keys}:
        members = [k for k in keys if group(k, cols, size) == place]
        order = sorted(members, key=lambda k: (scores[k], k))
        gone = [k for k in members if k not in kept]
        assert gone == sorted(order[: len(gone)])


@pytest.mark.parametrize("trial", range(80))
@pytest.mark.parametrize("signal", [True, False])
def test_growth_enters_the_emptiest_groups_by_the_largest_signal(trial, signal) -> None:
    draw, rows, cols, kept, size, score = drawn(trial)
    free = [k for k in range(rows * cols) if k not in kept]
    count = draw.randrange(len(free) + 1)
    scores = torch.tensor(score, dtype=torch.float64)
    held = torch.tensor(kept, dtype=torch.int64)
    scores[held] = -1.0
    generator = torch.Generator().manual_seed(trial)
    places = Candidates("x", held, rows * cols, scores if signal else None, generator, cols)
    grown = GrowInGroups(size)(places, count).tolist()
    assert len(set(grown)) == count and set(grown) <= set(free)

    fill = {place: 0 for place in {group(k, cols, size) for k in range(rows * cols)}}
    room = dict(fill)
    for k in range(rows * cols):
        room[group(k, cols, size)] += 1
    for k in [*kept, *grown]:
        fill[group(k, cols, size)] += 1
    entered = {group(k, cols, size) for k in grown}
    open_groups = [fill[g] for g in fill if fill[g] < room[g]]
    assert all(fill[g] <= min(open_groups, default=fill[g]) + 1 for g in entered)
    if signal:
        for place in fill:
            members = [k for k in free if group(k, cols, size) == place]
            best = sorted(members, key=lambda k: (-score[k], k))
            mine = [k for k in grown if group(k, cols, size) == place]
            assert mine == sorted(best[: len(mine)])


@pytest.mark.parametrize("trial", range(60))
def test_neurons_share_growth_by_their_mean_signal(trial) -> None:
    draw, rows, cols, kept, _, score = drawn(trial)
    free = [k for k in range(rows * cols) if k not in kept]
    count = draw.randrange(len(free) + 1)
    held = torch.tensor(kept, dtype=torch.int64)
    scores = torch.tensor(score, dtype=torch.float64)
    scores[held] = -1.0
    grown = grow_neurons(Candidates("x", held, rows * cols, scores, None, cols), count).tolist()
    own = [[k for k in free if k // cols == r] for r in range(rows)]
    means = [sum(score[k] for k in r) / len(r) if r else 0.0 for r in own]
    shares = [m / sum(means) if sum(means) else len(r) / max(1, len(free)) for m, r in
              zip(means, own, strict=True)]  # fmt: skip
    allowed = rules.redistribute(count, shares, [len(r) for r in own], cap=1.0)
    expected = []
    for places, number in zip(own, allowed, strict=True):
        expected += sorted(places, key=lambda k: (-score[k], k))[:number]
    assert grown == sorted(expected) and len(grown) == count


def test_rules_in_groups_say_what_they_lack() -> None:
    state = LayerState("fc", torch.arange(2), *[torch.ones(2, 1, 1)] * 2, torch.ones(2), 4)
    with pytest.raises(ValueError, match="layer fc: .*block_cols"):
        PruneInGroups()([state], [1])
    with pytest.raises(ValueError, match="layer fc: .*'random'"):
        grow_neurons(Candidates("fc", torch.arange(2), 4, None, None, 2), 1)
    with pytest.raises(ValueError, match="groups:M"):
        group_size("groups:0")


def arranged(rule: str, density: float, **options):
    """A net with a pattern of that kind, and what trains it by the rule for 16 steps."""
    torch.manual_seed(0)
    model = make_model(density=density, sizes=(12, 16, 8, 4))
    arrange(model, rule, torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks = SparseMomentum(
        model, optimizer, total_steps=16, update_every=3, prune=rule, growth=rule,
        redistribution="none", **options,
    )  # fmt: skip
    return model, optimizer, masks


@pytest.mark.parametrize("rule", ["fan_in", "groups:4"])
@pytest.mark.parametrize("signal", ["exact", "random"])
def test_training_keeps_the_groups_level(rule, signal) -> None:
    model, optimizer, masks = arranged(rule, 0.25, signal=signal)
    patterns = []

    def level(layer) -> None:
        mask = layer.pattern.mask()
        fill = mask.sum(1) if rule == "fan_in" else mask.view(len(mask), -1, 4).sum(2).flatten()
        assert int(fill.max()) == int(fill.min()) == (mask.shape[1] if rule == "fan_in" else 4) // 4

    for layer in sparse(model):
        level(layer)
    masks.on_update = lambda record: patterns.append([x.pattern.keys() for x in sparse(model)])
    train(model, optimizer, masks, 16)
    for layer in sparse(model):
        level(layer)
    assert len(patterns) == 5 and any(
        not torch.equal(a, b) for a, b in zip(patterns[0], patterns[-1], strict=True)
    )


def test_gradual_pruning_keeps_the_groups_level() -> None:
    model, optimizer, masks = arranged("groups:4", 0.5, final_density=0.25, prune_rate=0.3)
    train(model, optimizer, masks, 16)
    for layer in sparse(model):
        mask = layer.pattern.mask()
        assert mask.view(len(mask), -1, 4).sum(2).unique().tolist() == [1]


def test_the_method_fan_in_prunes_by_layer_and_fills_the_rows_again() -> None:
    """SRigL: the smallest weights of the layer go, and each row regrows what it lost."""
    torch.manual_seed(0)
    model = make_model(density=0.25, sizes=(12, 16, 8, 4))
    arrange(model, "fan_in", torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks = SparseMomentum(
        model, optimizer, total_steps=16, update_every=3, **method("fan-in").options
    )
    spread, updates = [], []

    def rows(layer) -> torch.Tensor:
        return layer.pattern.keys() // layer.matrix_shape[1]

    def check(record) -> None:
        updates.append(record.removed)
        for layer, before in zip(sparse(model), old, strict=True):
            assert torch.bincount(rows(layer)).unique().tolist() == [layer.matrix_shape[1] // 4]
            left = ~torch.isin(before, layer.pattern.keys())
            lost = torch.bincount(before[left] // layer.matrix_shape[1])
            spread.append(int(lost.max() - lost.min()) if lost.numel() else 0)
            old[sparse(model).index(layer)] = layer.pattern.keys().clone()

    old = [layer.pattern.keys().clone() for layer in sparse(model)]
    masks.on_update = check
    train(model, optimizer, masks, 16)
    assert len(updates) == 3 and all(updates) and max(spread) > 1  # of one row more than of others


@pytest.mark.parametrize("block", [(1, 1), (2, 3)])
def test_arranging_keeps_the_weights_of_an_initialisation(block) -> None:
    model = make_model(density=0.3, sizes=(13, 17, 5), block=block)
    torch.manual_seed(0)
    before = []
    for layer in sparse(model):
        torch.nn.init.normal_(layer.values.data[: layer.pattern.nnzb])
        inside = layer.pattern.compress(layer.pattern.expand(layer.values.data))
        layer.values.data.copy_(inside)
        before.append(layer.dense_matrix().detach().abs().sum())
    total = stored(model)
    arrange(model, "fan_in", torch.Generator().manual_seed(0))
    assert stored(model) == total
    for layer, old in zip(sparse(model), before, strict=True):
        layer.pattern.validate()
        rows = layer.pattern.keys() // BlockGrid.of(layer).block_cols
        fill = torch.bincount(rows, minlength=BlockGrid.of(layer).block_rows)
        assert int(fill.max() - fill.min()) <= 1
        found = layer.dense_matrix().detach().abs().sum()
        stored_sum = layer.values.detach()[: layer.pattern.nnzb].abs().sum()
        torch.testing.assert_close(found, stored_sum)  # nothing outside the matrix
        if block == (1, 1):
            torch.testing.assert_close(found, old)  # the same weights at other places
