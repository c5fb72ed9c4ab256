"""Whole trainings beside the reference on masked dense tensors (benchmarks/masked_reference.py)."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from script_support import benchmark_script

from sparse_kernels.cli import main


@pytest.fixture
def script() -> Any:
    module = benchmark_script("masked_reference")
    before = torch.get_num_threads()
    yield module
    torch.set_num_threads(before)


@pytest.mark.parametrize("net", ["lenet-300-100", "lenet-5-caffe"])
def test_a_training_begins_like_that_of_masked_dense_tensors(
    script: Any, net: str, tmp_path: Path
) -> None:
    """The same losses up to rounding before the first update; the same layers grow in it."""
    words = ["--net", net, "--data", "mnist-sample", "--density", "0.2", "--lr", "0.05"]
    rows = script.main([*words, "--epochs", "2", "--seed", "3"])
    done = CliRunner().invoke(
        main,
        ["train", *words, "--seed", "3", "--signal", "exact", "--threads", "1", "--epochs", "100",
         "--max-steps", "72", "--out", str(tmp_path), "--name", "ours"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    with (tmp_path / "ours" / "log-sparse-seed3.csv").open() as file:
        ours = list(csv.DictReader(file))
    assert len(ours) == len(rows) == 2
    assert float(ours[0]["train_loss"]) == pytest.approx(rows[0]["loss"], rel=1e-3)
    assert float(ours[1]["train_loss"]) == pytest.approx(rows[1]["loss"], rel=0.05)
    assert rows[0]["density"] == pytest.approx([0.2] * len(rows[0]["density"]), abs=0.003)
    densities = [float(share) for name, share in ours[0].items() if name.startswith("density:")]
    assert densities == pytest.approx(rows[1]["density"], abs=0.02)
    assert densities != pytest.approx(rows[0]["density"], abs=0.02)
