"""benchmarks/never_slower.py: what it draws, how it goes on, its verdict; nothing is timed."""

from __future__ import annotations

import pytest
from script_support import benchmark_script


@pytest.fixture
def bench():
    return benchmark_script("never_slower")


@pytest.mark.parametrize("largest", [1e6, 3e9])
def test_no_layer_is_larger_than_allowed(bench, largest) -> None:
    for index in range(100):
        row = bench.draw(3, index, largest)
        assert row == bench.draw(3, index, largest)
        work = row["batch"] * row["in"] * row["out"]
        if row["kind"] == "conv2d":
            side = -(-row["image"] // row["stride"])
            work *= row["kernel"] ** 2 * side**2
        assert 0 < work <= largest


def test_a_run_goes_on_after_whole_rows_and_past_wrong_layers(bench, monkeypatch, tmp_path) -> None:
    raced = []

    def race(layer, x, seconds, layout):
        raced.append(layer)
        facts = {"storage": "compressed", "settled": "certain", "tuned": "certain"}
        return {**facts, "planned_ms": 1.0, "dense_ms": 2.0, "ratio": 2.0}

    def check(layer, x):
        if len(raced) == 1:
            raise RuntimeError("off")

    monkeypatch.setattr(bench, "race", race)
    monkeypatch.setattr(bench, "check", check)
    journal = tmp_path / "folder" / "rows.jsonl"
    settings = {"seed": 0, "layout": "own"}
    bench.run(2, journal, settings, 1.0, 1e5)
    whole = journal.read_text()
    journal.write_text(whole + '{"index": 2, "ki')  # interrupted while it wrote
    rows = bench.run(3, journal, settings, 1.0, 1e5)
    assert journal.read_text().startswith(whole) and len(rows) == 3
    assert rows[1]["wrong"] == "off" and "wrong" in bench.describe(rows[1]).lower()
    assert "least ratio 2.00x; under 0.95x dense: 0 of" in bench.verdict(rows)
    assert bench.markdown(rows, "command").count("\n| ") == 1 + len(rows)
    with pytest.raises(ValueError, match="--fresh"):
        bench.run(3, journal, {"seed": 1, "layout": "own"}, 1.0, 1e5)


def test_the_verdict_counts_what_the_targets_count(bench) -> None:
    row = {"density": 0.05, "in": 64, "out": 64, "storage": "compressed", "ratio": 2.0}
    rows = [
        {**row, "dense_ms": 3.0},
        {**row, "dense_ms": 0.1, "storage": "dense-masked", "ratio": 0.9},
        {**row, "in": 32, "dense_ms": 0.2, "storage": "dense-masked", "ratio": 0.95},
    ]
    assert bench.verdict(rows) == (
        "least ratio 0.90x; under 0.95x dense: 1 of 3; <= 5 % and >= 64 channels: 1 of 2 served "
        "sparse, dense time of the others: 0.100 ms; wrong: 0"
    )
