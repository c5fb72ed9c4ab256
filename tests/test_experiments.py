"""The commands of docs/experiments.md: every run that they would make has settings that hold."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from sparse_kernels import cli
from sparse_kernels._cli_train import settings_of
from sparse_kernels.workbench import sweep

TEXT = (Path(__file__).resolve().parents[1] / "docs" / "experiments.md").read_text("utf-8")
COMMANDS = re.findall(r"^sparse-kernels (sweep .*)$", TEXT, re.M)
RUNS = {"mnist-300": 20, "mnist-caffe": 20, "mnist-dense": 10, "mnist-caffe-half-rate": 20,
        "caffe-dense-half-rate": 5, "mnist-methods": 50, "caffe-methods": 50,
        "mnist-signals": 80, "mnist-sensitivity": 65, "mnist-ablation": 20,
        "caffe-ablation": 20, "mnist-shapes": 72, "mnist-depth-scaled": 48, "cifar-5": 20,
        "cifar-alexnet": 10, "cifar-like": 5, "cifar-wrn-28-2": 25}  # fmt: skip


def test_all_sweeps_were_found() -> None:
    assert [re.search(r"--out runs/([\w-]+)", c)[1] for c in COMMANDS] == list(RUNS)


@pytest.mark.parametrize("command", COMMANDS, ids=list(RUNS))
def test_every_run_of_a_sweep_has_settings_that_hold(command, tmp_path, monkeypatch) -> None:
    wanted: list[sweep.Task] = []
    monkeypatch.setattr(sweep, "run", lambda folder, tasks, *rest: wanted.extend(tasks) or tasks)
    monkeypatch.setattr(sweep, "reuse", lambda folder, tasks, other, settings_of: 0)
    done = CliRunner().invoke(cli.main, shlex.split(command))
    assert done.exit_code == 1 and "runs failed" in done.output  # nothing was trained
    out = re.search(r"--out runs/([\w-]+)", command)[1]
    assert len({task.name for task in wanted}) == len(wanted) == RUNS[out]
    trained = [settings_of(task.words(tmp_path)[1:]) for task in wanted]
    assert {config.run_name() for config in trained} == {task.name for task in wanted}
    epochs, batch = (250, 128) if out.startswith("cifar") else (100, 100)
    assert all((c.epochs, c.holdout, c.batch_size) == (epochs, 0.1, batch) for c in trained)
