"""Training with blocks from end to end: the command's loop, and benchmarks/block_accuracy.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import ModuleType

import pytest
import torch
from script_support import benchmark_script
from workbench_support import SMALL

from sparse_kernels import plan
from sparse_kernels.workbench import loop
from sparse_kernels.workbench.contenders import build_sparse


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("block", ["16x16", "4x4", "auto"])
def test_train_learns_and_redistributes_with_blocks(tmp_path: Path, block: str) -> None:
    config = dataclasses.replace(SMALL, block=block, compare=None, density=0.2, init="scaled")
    (run,) = loop.train(config, tmp_path)["runs"]
    losses = [epoch["train_loss"] for epoch in run["epochs"]]
    assert losses[-1] < losses[0] and run["test_accuracy"] > 0.4  # chance: 0.1
    assert run["epochs"][-1]["layers"] != run["initial_layers"]
    assert f"--block {block}" in config.command()


def test_tiles_are_served_by_the_native_kernels_and_what_does_not_fit_is_told() -> None:
    """16 x 16 on the CPU: compressed, not a dense product; a classifier of 10 rows stays dense."""
    contender = build_sparse(dataclasses.replace(SMALL, block="16x16"), 0, 10, 5)
    hidden = contender.model[1]
    assert hidden.block == (16, 16) and hidden.storage == "compressed"
    x = torch.zeros(1, 784)
    for op in ("linear", "linear_dgrad", "linear_wgrad"):
        assert plan.choose(op, x, hidden.values).__name__ == "sparse_kernels.backends.cpu"
    row = contender.report["5"]
    assert row.action == "skipped" and "smaller than the block: 10 x 100" in row.reason
    assert row.block is None


# ---- benchmarks/block_accuracy.py --------------------------------------------------------------

TRIAL = ["--data", "mnist-sample", "--epochs", "2", "--batch-size", "600", "--blocks", "1x1,16x16"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return benchmark_script("block_accuracy")


def test_a_second_command_goes_on_where_the_first_was_cut_off(script, tmp_path, capsys) -> None:
    out = tmp_path / "results" / "rows.jsonl"
    options = [*TRIAL, "--densities", "0.1", "--out", str(out)]
    first = script.main([*options, "--seeds", "1", "--no-dense"])
    assert [(row["block"], row["seed"]) for row in first] == [("1x1", 0), ("16x16", 0)]
    text = out.read_text()
    out.write_text(text + '{"block": "1x1", "dens')  # cut off while writing
    second = script.main([*options, "--seeds", "2"])
    assert second[:2] == first and len(out.read_text().splitlines()) == 1 + 6
    assert sorted((r["block"], r["seed"]) for r in second[2:]) == [
        ("16x16", 1), ("1x1", 1), ("dense", 0), ("dense", 1),
    ]  # fmt: skip
    again = script.main([*options, "--seeds", "2"])
    assert again == second and "6 runs of 6" in capsys.readouterr().out
    table = out.with_suffix(".md").read_text()
    assert "| 16x16 | 10 % |" in table and "| dense | 100 % |" in table and "+0.00" in table


def test_every_block_has_the_same_number_of_weights(script, tmp_path) -> None:
    """To within the blocks that partial edges make smaller; the classifier is dense in all."""
    options = ["--data", "mnist-sample", "--epochs", "1", "--batch-size", "900", "--no-dense"]
    options += ["--seeds", "1", "--max-steps", "1", "--out", str(tmp_path / "rows.jsonl")]
    for row in script.main(options):
        assert row["layers"]["5"] == 1.0
        bh, bw = (int(side) for side in row["block"].split("x"))
        # Roundings to whole blocks, and how many of those drawn are partial.
        weights = row["density"] * 266_200
        found = row["density_before"] * 266_200
        assert abs(found - weights) <= max(3 * bh * bw, 0.01 * weights)


def test_time_that_is_over_starts_no_run_and_other_settings_are_refused(
    script, tmp_path, capsys
) -> None:
    out = tmp_path / "rows.jsonl"
    assert script.main([*TRIAL, "--minutes", "-1", "--out", str(out)]) == []
    assert "are over; the same command goes on" in capsys.readouterr().out
    with pytest.raises(ValueError, match="give another --out"):
        script.main([*TRIAL, "--signal", "exact", "--out", str(out)])
