"""Some hostile calls in every run, thousands in `make test-full`.

``python tests/hostile_calls.py --calls N`` makes as many as wanted.
"""

from __future__ import annotations

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is a test dependency")
import torch
from hostile_calls import COUNT, Layers, run


def test_layers_under_any_order_of_calls() -> None:
    run(examples=10, steps=25)
    assert COUNT["calls"] > 150 and COUNT["refused"] > 40


def test_a_seed_repeats_its_calls_and_another_makes_others() -> None:
    made = []
    for seed in (3, 3, 4):
        before = dict(COUNT)
        run(examples=3, steps=12, seed=seed)
        made.append(tuple(COUNT[name] - before[name] for name in COUNT))
    assert made[0] == made[1] != made[2]


def test_damage_that_nothing_reads_must_change_nothing() -> None:
    results = [torch.zeros(2), torch.ones(2)]
    machine = Layers()
    machine._same_or_legal(results, unused=False)
    with pytest.raises(AssertionError):
        machine._same_or_legal(results, unused=True)


@pytest.mark.slow
def test_layers_under_many_more_calls() -> None:
    run(examples=1500, steps=50, seed=1)
