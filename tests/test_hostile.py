"""Some hostile calls in every run, thousands in `make test-full`.

``python tests/hostile_calls.py --calls N`` makes as many as wanted.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("hypothesis", reason="hypothesis is a test dependency")
import hostile_calls
import torch
from hostile_calls import COUNT, NAMES, Rules, play, run
from hostile_model import csr_is_right, mask_of, refused, sides


def test_rules_in_any_order() -> None:
    before = COUNT["calls"], COUNT["refused"]
    run(examples=10, steps=25)
    assert COUNT["calls"] - before[0] > 150 and COUNT["refused"] - before[1] > 40


def test_every_rule_is_played() -> None:
    made = sum((play(game) for game in range(12)), start=play(12))
    assert {name for name in NAMES if not made[name]} == set()


def test_a_seed_repeats_its_calls_and_another_makes_others() -> None:
    assert play(3) == play(3) != play(4)
    counts = []
    for seed in (3, 3, 4):
        before = dict(COUNT)
        run(examples=3, steps=12, seed=seed)
        counts.append(tuple(COUNT[name] - before[name] for name in COUNT))
    assert counts[0] == counts[1] != counts[2]


def test_a_finding_names_game_and_step_and_ends_the_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(rules: Rules, draw: object) -> None:
        rules.layer.values.data += 1  # what no call does: the next check must see it
        rules.check()

    monkeypatch.setattr(Rules, "convert", broken)
    monkeypatch.setattr(hostile_calls, "HOME", tmp_path)
    record = tmp_path / "record.jsonl"
    assert not hostile_calls.one_round(1, record, "code")
    line = json.loads(record.read_text())
    assert line["finding"].startswith(f"game {line['last']}, step ")
    assert "rule convert" in line["finding"]


def test_a_process_that_ended_names_its_game(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hostile_calls, "HOME", tmp_path)
    (tmp_path / "playing").write_text("77\n")
    for _ in range(2):  # told once
        hostile_calls.note_end(tmp_path / "record.jsonl", "code")
    (line,) = (json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines())
    assert line["finding"] == "game 77: the process ended" and line["last"] == 77


def test_damage_that_nothing_reads_must_change_nothing() -> None:
    results = [torch.zeros(2), torch.ones(2)]
    Rules()._same_or_legal(results, unused=False)
    with pytest.raises(AssertionError):
        Rules()._same_or_legal(results, unused=True)


def test_the_model_knows_blocks_and_pointers() -> None:
    assert sides(6, 2, 2) == [range(0, 2), range(2, 3), range(3, 5), range(5, 6)]
    mask = mask_of([1, 2], sides(2, 1, 1), sides(4, 2, 2))
    assert mask.tolist() == [[False, False, True, True], [True, True, False, False]]
    assert csr_is_right([0, 1, 3], [1, 0, 2, 77], 2, 3)
    for crow, col in (([0, 1], [0]), ([0, 2, 2], [1, 1]), ([0, 1, 0], [0]), ([0, 0, 1], [3])):
        assert not csr_is_right(crow, col, 2, 3)


def test_what_is_taken_or_says_nothing_is_no_refusal() -> None:
    def silent() -> None:
        raise ValueError("no")

    for call in (lambda: None, silent):
        with pytest.raises(AssertionError):
            refused(call)
    with pytest.raises(IndexError):
        refused(lambda: [][0])


@pytest.mark.slow
def test_layers_under_many_more_calls() -> None:
    run(examples=1500, steps=50, seed=1)
