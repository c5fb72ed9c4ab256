"""The rules against definitions written out in plain Python, over random trials full of ties."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch

from sparse_kernels.pattern import SparsityPattern
from sparse_kernels.training import rules, selection
from sparse_kernels.training.blocks import BlockGrid
from sparse_kernels.training.rules import Candidates, LayerState
from sparse_kernels.training.schedule import (
    UpdateSchedule,
    cosine_decay,
    linear_decay,
    window_length,
)


def layer(values, momentum=None, blocks=None, name="layer") -> LayerState:
    values = torch.as_tensor(values, dtype=torch.float64).reshape(-1, 1, 1)
    n = values.shape[0]
    momentum = values if momentum is None else torch.as_tensor(momentum).reshape(-1, 1, 1)
    return LayerState(
        name, torch.arange(n), values, momentum, torch.ones(n).long(), blocks or 2 * n
    )


def picked(mask: torch.Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


# ---- selection ---------------------------------------------------------------------------------


@pytest.mark.parametrize("trial", range(60))
def test_selection_is_the_sorted_prefix_with_ties_to_the_lowest_index(trial):
    draw = random.Random(trial)
    n = draw.randrange(1, 60)
    scores = [draw.choice([0.0, 0.5, 1.0, 2.0, draw.random()]) for _ in range(n)]
    count = draw.randrange(n + 1)
    dtype = draw.choice([torch.float32, torch.float64])
    tensor = torch.tensor(scores, dtype=dtype)
    scores = tensor.tolist()
    smallest = sorted(range(n), key=lambda i: (scores[i], i))[:count]
    largest = sorted(range(n), key=lambda i: (-scores[i], i))[:count]
    assert picked(selection.select_smallest(tensor, count)) == sorted(smallest)
    assert selection.largest_indices(tensor, count).tolist() == sorted(largest)


def test_selection_of_a_large_layer_is_exact_when_all_scores_tie():
    scores = torch.zeros(2_400_000)
    assert picked(selection.select_smallest(scores, 1_234_567))[-1] == 1_234_566
    assert selection.largest_indices(scores, 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("count", [1, 700, 5_000, 24_999, 25_001, 150_000])
@pytest.mark.parametrize("kind", ["normal", "ties", "striped", "kept"])
def test_largest_indices_of_a_long_layer_are_those_of_a_stable_sort(kind, count):
    """Long enough for the shortlist; "striped" hides the large scores from its regular sample."""
    generator = torch.Generator().manual_seed(count)
    scores = torch.randn(200_000, generator=generator).abs()
    if kind == "ties":
        scores = (scores * 3).round()
    elif kind == "striped":
        scores[:: (200_000 // selection._SAMPLE) | 1] *= 1e-3
    elif kind == "kept":
        scores[torch.randperm(200_000, generator=generator)[:60_000]] = -1.0
    expected = scores.sort(descending=True, stable=True).indices[:count].sort().values
    assert torch.equal(selection.largest_indices(scores, count), expected)


@pytest.mark.parametrize("count", [-1, 4])
@pytest.mark.parametrize("select", [selection.select_smallest, selection.largest_indices])
def test_selection_refuses_an_impossible_count(select, count):
    with pytest.raises(ValueError, match=f"cannot select {count} of 3"):
        select(torch.ones(3), count)


# ---- importance and counts ---------------------------------------------------------------------


def test_importance_is_the_mean_over_stored_weights():
    layers = [layer([1.0, -3.0]), layer([0.5, 0.5, -0.5]), layer([])]
    raw = rules.importance_momentum(layers)
    assert raw.tolist() == [2.0, 0.5, 0.0]
    assert rules.normalise(raw, [2, 3, 0]) == [0.8, 0.2, 0.0]
    assert rules.importance_nonzero(layers).tolist() == [2.0, 3.0, 0.0]


@pytest.mark.parametrize(
    ("raw", "nnz", "expected"),
    [
        ([0.0, 0.0], [3, 1], [0.75, 0.25]),
        ([5.0, 1.0], [0, 4], [0.0, 1.0]),
        ([0.0, 0.0], [0, 0], [0.0, 0.0]),
        ([1e308, 1e308], [1, 1], [0.5, 0.5]),
        ([5e-324, 0.0], [1, 1], [1.0, 0.0]),
        ([], [], []),
    ],
)
def test_normalised_importance_is_never_nan(raw, nnz, expected):
    assert rules.normalise(torch.tensor(raw, dtype=torch.float64), nnz) == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_normalise_refuses_what_is_no_importance(bad):
    with pytest.raises(ValueError, match="finite and >= 0"):
        rules.normalise(torch.tensor([bad, 1.0]), [1, 1])
    with pytest.raises(ValueError, match="2 layers, got 1"):
        rules.normalise(torch.tensor([1.0]), [1, 1])


@pytest.mark.parametrize("trial", range(40))
def test_prune_counts_by_their_definition(trial):
    draw = random.Random(trial)
    count = draw.randrange(1, 6)
    blocks = [draw.randrange(1, 200) for _ in range(count)]
    nnz = [draw.choice([0, b, draw.randrange(b + 1), round(0.9 * b)]) for b in blocks]
    shares = [draw.random() for _ in range(count)]
    shares = [s / sum(shares) for s in shares]
    p = draw.choice([0.0, 0.005, 0.2, 0.5, 1.0, draw.random()])
    for n, b, r, k in zip(
        nnz, blocks, shares, rules.prune_counts(nnz, blocks, shares, p), strict=True
    ):
        sparsity = Fraction(b - n, b)
        if sparsity < Fraction(1, 5) and r > 1 / count and sparsity < p:
            assert k == math.ceil(sparsity * n)
        else:
            assert k == math.ceil(p * n)
        assert 0 <= k <= n


def test_prune_count_tweak_spares_a_dense_layer_that_is_wanted():
    assert rules.prune_counts([90, 90], [100, 100], [0.9, 0.1], 0.5) == [9, 45]
    assert rules.prune_counts([100, 50], [100, 100], [0.9, 0.1], 0.5) == [0, 25]
    assert rules.prune_counts([80, 80], [100, 100], [0.9, 0.1], 0.5) == [40, 40]
    # In floating point 7 / 49 * 42 is above 6.
    assert rules.prune_counts([42, 42], [49, 49], [0.9, 0.1], 0.5) == [6, 21]


# ---- redistribution ----------------------------------------------------------------------------


def water(total, shares, caps):
    """The official loop in exact arithmetic: what overflows is spread evenly, until none does."""
    regrowth = [Fraction(s) * total for s in shares]
    opened = set(range(len(caps)))
    level = Fraction(0)
    while True:
        filled = [min(Fraction(c), w + level) for c, w in zip(caps, regrowth, strict=True)]
        opened = {i for i in range(len(caps)) if regrowth[i] + level < caps[i]}
        rest = total - sum(filled)
        if rest <= 0 or not opened:
            return filled
        level += rest / len(opened)


@pytest.mark.parametrize("trial", range(150))
def test_redistribution_is_exact_capped_and_nearest_to_the_shares(trial):
    draw = random.Random(trial)
    count = draw.randrange(1, 7)
    free = [draw.choice([0, 1, draw.randrange(300)]) for _ in range(count)]
    total = draw.choice([0, sum(free), draw.randrange(sum(free) + 1)])
    shares = [draw.choice([0.0, draw.random(), 1.0]) for _ in range(count)]
    shares = [s / sum(shares) for s in shares] if sum(shares) else [0.0] * count
    counts = rules.redistribute(total, shares, free)
    assert sum(counts) == total and all(isinstance(c, int) for c in counts)
    caps = [math.floor(0.99 * f) for f in free]
    if sum(caps) < total:
        caps = free
    assert all(0 <= c <= cap for c, cap in zip(counts, caps, strict=True))
    for c, w in zip(counts, water(total, shares, caps), strict=True):
        assert abs(c - w) < 1 + 1e-6


def test_redistribution_by_hand():
    assert rules.redistribute(10, [0.5, 0.5], [100, 100]) == [5, 5]
    assert rules.redistribute(11, [0.5, 0.5], [100, 100]) == [6, 5]  # a tie: the lowest layer
    assert rules.redistribute(10, [0.8, 0.1, 0.1], [5, 50, 50]) == [4, 3, 3]  # cap floor(4.95)
    assert rules.redistribute(10, [1.0, 0.0], [6, 100]) == [5, 5]
    assert rules.redistribute(200, [0.5, 0.5], [100, 100]) == [100, 100]  # caps relaxed
    assert rules.redistribute(0, [0.5, 0.5], [0, 0]) == [0, 0]
    with pytest.raises(ValueError, match="cannot place 5 blocks in 4 free places"):
        rules.redistribute(5, [0.5, 0.5], [2, 2])


# ---- prune rules -------------------------------------------------------------------------------


def test_magnitude_prunes_the_smallest_of_each_layer():
    layers = [layer([3.0, -1.0, 1.0, -2.0]), layer([0.1, 0.2])]
    assert [picked(m) for m in rules.prune_magnitude(layers, [2, 1])] == [[1, 2], [0]]
    assert [picked(m) for m in rules.prune_magnitude(layers, [1, 0])] == [[1], []]


def test_global_magnitude_prunes_the_smallest_of_all():
    layers = [layer([3.0, -1.0, 1.0, -2.0]), layer([0.1, 0.2]), layer([])]
    masks = rules.prune_global_magnitude(layers, [2, 1, 0])
    assert [picked(m) for m in masks] == [[1, 2], [0], []]  # no layer is emptied
    masks = rules.prune_global_magnitude(layers, [3, 2, 0])
    assert [picked(m) for m in masks] == [[0, 1, 2, 3], [0], []]  # unless all must go


@pytest.mark.parametrize("trial", range(30))
def test_set_prunes_both_signs_nearest_to_zero(trial):
    draw = random.Random(trial)
    values = [draw.choice([-1, 1]) * draw.randrange(1, 9) / 4 for _ in range(draw.randrange(1, 40))]
    count = draw.randrange(len(values) + 1)
    mask = rules.prune_set([layer(values)], [count])[0]
    gone = set(picked(mask))
    assert len(gone) == count
    for sign in (-1, 1):
        members = [i for i, v in enumerate(values) if v * sign > 0]
        order = sorted(members, key=lambda i: (abs(values[i]), i))
        lost = [i for i in members if i in gone]
        assert lost == sorted(order[: len(lost)])
        assert abs(len(lost) - count * len(members) / len(values)) < 1 + 1e-9


def test_partial_blocks_are_scored_by_their_elements_inside():
    values = torch.tensor([[[1.0, 1.0]], [[1.5, 0.0]]])  # the second block has one element inside
    state = LayerState("x", torch.arange(2), values, values, torch.tensor([2, 1]), 9)
    assert state.magnitudes().tolist() == [1.0, 1.5]
    assert picked(rules.prune_magnitude([state], [1])[0]) == [0]
    assert float(rules.mean_magnitude(values, state.counts)) == pytest.approx(3.5 / 3)


# ---- growth rules ------------------------------------------------------------------------------


@pytest.mark.parametrize("trial", range(60))
def test_growth_takes_the_largest_free_and_fills_up(trial):
    """Few non-zero momenta: the official code would pick stored weights, here free ones follow."""
    draw = random.Random(trial)
    blocks = draw.randrange(1, 50)
    kept = sorted(draw.sample(range(blocks), draw.randrange(blocks + 1)))
    score = [draw.choice([0.0, 0.0, 1.0, draw.random()]) for _ in range(blocks)]
    scores = torch.tensor(score, dtype=torch.float64)
    scores[torch.tensor(kept, dtype=torch.int64)] = -1.0
    free = [i for i in range(blocks) if i not in kept]
    count = draw.randrange(len(free) + 1)
    expected = sorted(free, key=lambda i: (-score[i], i))[:count]
    candidates = Candidates("x", torch.tensor(kept, dtype=torch.int64), blocks, scores, None)
    assert rules.grow_largest(candidates, count).tolist() == sorted(expected)


def test_growth_by_signal_without_a_signal_says_what_to_do():
    with pytest.raises(ValueError, match=r"layer fc: .*growth='random'"):
        rules.grow_largest(Candidates("fc", torch.arange(1), 4, None, None), 1)


@pytest.mark.parametrize("trial", range(60))
def test_random_growth_is_free_distinct_and_repeatable(trial):
    draw = random.Random(trial)
    blocks = draw.randrange(1, 400)
    kept = torch.tensor(sorted(draw.sample(range(blocks), draw.randrange(blocks + 1)))).long()
    free = set(range(blocks)) - set(kept.tolist())
    count = draw.choice([0, len(free), draw.randrange(len(free) + 1)])
    results = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(trial)
        results.append(rules.grow_random(Candidates("x", kept, blocks, None, generator), count))
    assert torch.equal(*results)
    keys = results[0].tolist()
    assert len(set(keys)) == len(keys) == count and set(keys) <= free


def test_random_growth_reaches_every_free_place_alike():
    kept = torch.tensor([0, 3, 4, 19])
    generator = torch.Generator().manual_seed(1)
    hits = torch.zeros(40)
    for _ in range(1500):
        hits[rules.grow_random(Candidates("x", kept, 40, None, generator), 6)] += 1
    assert not hits[kept].any()
    free = hits[hits > 0]
    # 1500 draws of 6 from 36: 250 each, standard deviation 14.4; five of them is a wide berth.
    assert free.numel() == 36 and float((free - 250).abs().max()) < 72


# ---- block geometry ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "block", "parts"),
    [
        ((7, 11), (1, 1), (1, 1)),
        ((7, 11), (2, 3), (1, 1)),
        ((10, 20), (4, 1), (2, 4)),
        ((9, 15), (2, 4), (3, 3)),
        ((8, 12), (4, 4), (2, 1)),
    ],
)
def test_block_grid_agrees_with_the_pattern(shape, block, parts):
    grid = BlockGrid(*shape, *block, *parts)
    pattern = SparsityPattern.full(shape, block, *parts)
    keys = pattern.keys()
    assert grid.blocks == keys.numel() == pattern.block_rows * pattern.block_cols
    assert torch.equal(grid.counts(keys), pattern.element_counts())
    dense = torch.randn(shape, dtype=torch.float64)
    blocks = grid.to_blocks(dense)
    assert torch.equal(blocks, pattern.compress(dense))
    expected = blocks.abs().sum(dim=(1, 2)) / pattern.element_counts()
    torch.testing.assert_close(grid.means(blocks), expected)


# ---- schedule ----------------------------------------------------------------------------------


def test_updates_at_the_end_of_every_epoch_but_the_last():
    schedule = UpdateSchedule(total_steps=40, update_every=10)
    assert [s for s in range(60) if schedule.is_update(s)] == [10, 20, 30]
    assert [schedule.next_update(s) for s in (0, 1, 10, 11, 30, 31, 99)] == [
        10, 10, 10, 20, 30, None, None,
    ]  # fmt: skip
    odd = UpdateSchedule(total_steps=35, update_every=10)
    assert [s for s in range(60) if odd.is_update(s)] == [10, 20, 30]


@pytest.mark.parametrize("length", [0, 1, 4, 10, 99, None])
def test_the_window_is_the_last_steps_before_an_update(length):
    schedule = UpdateSchedule(total_steps=40, update_every=10)
    for step in range(1, 60):
        update = next((u for u in (10, 20, 30) if u >= step), None)
        if update is None or length == 0:
            expected = False
        else:
            expected = length is None or step > update - length
        assert schedule.in_window(step, length) is expected, step


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 0.95, 0.99, 0.999])
@pytest.mark.parametrize("tolerance", [0.5, 0.1, 0.01, 1e-6])
def test_window_length_is_the_smallest(beta, tolerance):
    length = window_length(beta, tolerance)
    assert beta**length <= tolerance
    assert length == 1 or beta ** (length - 1) > tolerance


def test_window_length_of_the_paper_and_its_errors():
    assert window_length(0.9, 0.1) == 22 and window_length(0.9, 0.01) == 44
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        window_length(1.0, 0.1)
    with pytest.raises(ValueError, match="window_tolerance"):
        window_length(0.9, 0.0)


def test_decays():
    assert cosine_decay(0.5, 0.005, 0.0) == 0.5
    assert cosine_decay(0.5, 0.005, 1.0) == pytest.approx(0.005)
    assert cosine_decay(0.5, 0.005, 0.5) == pytest.approx(0.2525)
    assert [linear_decay(0.5, 0.005, t) for t in (0.0, 0.5, 1.0)] == [0.5, 0.25, 0.0]
