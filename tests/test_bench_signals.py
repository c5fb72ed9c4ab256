"""`sparse-kernels bench signals`: a row per signal, windows and bytes in their right order."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from sparse_kernels import cli


def test_every_signal_has_a_row_and_sampled_holds_less_than_window(tmp_path: Path) -> None:
    words = ["bench", "signals", "--net", "lenet-300-100", "--batch-size", "20", "--updates", "1",
             "--update-every", "17", "--window-tolerance", "0.35", "--threads", "1",
             "--out", str(tmp_path)]  # fmt: skip
    done = CliRunner().invoke(cli.main, words)
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("signals-lenet-300-100-*.json")
    rows = {row["signal"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["exact", "window", "sampled", "gradient", "random"]
    assert [rows[kind]["window"] for kind in rows] == [2700, 10, 10, 1, 0]
    # Gradient and momentum of all three layers; lists of a tenth with their indices; nothing.
    weights = 784 * 300 + 300 * 100 + 100 * 10
    assert rows["exact"]["bytes"] == rows["window"]["bytes"] == 2 * 4 * weights
    assert 0 < rows["sampled"]["bytes"] < rows["window"]["bytes"] / 2
    assert rows["random"]["bytes"] == 0
    assert rows["exact"]["outside"] is None and rows["random"]["inside"] is None
    assert all(rows[kind]["epoch_seconds"] > 0 for kind in rows)
    assert "| sampled | 10 |" in done.output
