"""The command line: what it writes, and that a user's mistake is one line, never a traceback."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from sparse_kernels import cli, info, plan
from sparse_kernels._cli_train import settings_of
from sparse_kernels.workbench import report

TINY = (
    "train --net lenet-300-100 --data mnist-sample --density 0.1 --compare dense "
    "--dense-baseline contiguous --batch-size 500 --max-steps 3 --threads 1 --name tiny"
)


@pytest.fixture(autouse=True)
def threads_stay() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def invoke(*words: str) -> Result:
    return CliRunner().invoke(cli.main, list(words))


def test_train_writes_a_run_and_report_renders_it_again(tmp_path: Path) -> None:
    done = invoke(*TINY.split(), "--seeds", "0,1", "--out", str(tmp_path))
    assert done.exit_code == 0, done.output
    folder = tmp_path / "tiny"
    names = {path.name for path in folder.iterdir()}
    logs = {f"log-{c}-seed{s}.csv" for c in ("sparse", "dense") for s in (0, 1)}
    assert logs | {"results.json", "table.md", "reproduce.txt"} <= names
    assert "| test accuracy |" in done.output and str(folder / "table.md") in done.output
    assert not [name for name in names if name.endswith(".part")]
    (folder / "table.md").unlink()
    again = invoke("report", str(folder))
    assert again.exit_code == 0 and (folder / "table.md").is_file()


def test_the_command_in_the_results_makes_the_same_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def remember(config: object, folder: Path, resume: bool, ranks: object) -> None:
        seen.append(config)
        raise ValueError("seen")

    monkeypatch.setattr("sparse_kernels.workbench.loop.train", remember)
    out = ["--out", str(tmp_path)]
    for words in (
        [*TINY.split(), "--seed", "3", "--seed", "4", "--block", "4x1", *out],
        ["train", "--net", "vgg16-d", "--no-augment", "--data-dir", "a b", "--threads", "2", *out],
        ["train", "--preset", "demo", "--width", "128", *out],
    ):
        assert invoke(*words).exit_code == 1
        assert invoke(*shlex.split(seen[-1].command())[1:]).exit_code == 1
        assert seen[-1] == seen[-2]
    assert (seen[0].seeds, seen[0].block) == ((3, 4), "4x1")
    assert (seen[2].epochs, seen[2].augment, seen[2].data) == (250, False, "cifar10")
    assert (seen[4].net, seen[4].data, seen[4].compare) == ("wide-mlp", "mnist-sample", "dense")


MISTAKES = {
    "density 0": ("--density 0", 1, "--density: expected"),
    "density 2": ("--density 2", 1, "--density: expected"),
    "no number": ("--density much", 2, "--density"),
    "unknown net": ("--net resnet", 1, "unknown net 'resnet'"),
    "unknown data": ("--data cifar", 1, "unknown data set 'cifar'"),
    "data of another loader": ("--net resnet-50 --data imagenet", 1, "your own loader"),
    "wrong pair": ("--net vgg16-d", 1, "takes cifar10 images"),
    "no such directory": ("--data mnist --data-dir nowhere", 1, "nowhere: this directory"),
    "bad seeds": ("--seeds 1,x", 2, "whole numbers"),
    "bad block": ("--block four", 1, "--block: expected"),
    "block above the layer": ("--block 512x512", 1, "no layer of lenet-300-100 can be sparse"),
    "unknown option": ("--sparsity 0.9", 2, "--sparsity"),
    "net above memory": ("--net wide-mlp --width 100000000", 1, "cannot be built"),
    "loss explodes": ("--lr 1e30", 1, "the loss of step"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(case: str, tmp_path: Path) -> None:
    words, code, message = MISTAKES[case]
    done = invoke(*TINY.split(), "--out", str(tmp_path), *words.split())
    assert done.exit_code == code, done.output
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert "Traceback" not in done.output
    assert not list(tmp_path.rglob("results.json"))


def test_an_unknown_backend_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_forced", "foo")  # what SPARSE_KERNELS_BACKEND=foo leaves there
    monkeypatch.setattr(plan, "_cache", {})
    for words in (["info"], [*TINY.split(), "--out", str(tmp_path)]):
        done = invoke(*words)
        assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
        assert "'foo' is no backend" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FloatingPointError("layer '1' at step 4"), "layer '1' at step 4"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes\nframe #0"),
            "not enough memory",
        ),
    ],
)
def test_what_training_raises_is_one_line(
    error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("sparse_kernels.workbench.loop.train", fail)
    done = invoke(*TINY.split(), "--out", str(tmp_path))
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
    (line,) = [text for text in done.stderr.splitlines() if text]
    assert line.startswith("Error: ") and message in line


def test_a_fault_of_ours_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("sparse_kernels.workbench.loop.train", fail)
    done = invoke(*TINY.split(), "--out", str(tmp_path))
    assert isinstance(done.exception, RuntimeError)


def test_a_run_is_kept_when_its_name_comes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(config: object, folder: Path, resume: bool, ranks: object) -> None:
        (folder / "log-x.csv").write_text(str(len(list(tmp_path.iterdir()))))
        raise ValueError("enough")

    monkeypatch.setattr("sparse_kernels.workbench.loop.train", leave)
    words = [*TINY.split(), "--out", str(tmp_path)]
    (tmp_path / "tiny").mkdir()  # empty, as a run that never started leaves it
    outputs = [invoke(*words).stdout for _ in range(3)]
    assert "note" not in outputs[0]
    for output, name in zip(outputs[1:], ("tiny-2", "tiny-3"), strict=True):
        assert "is kept" in output and str(tmp_path / name) in output
    logs = {path.parent.name: path.read_text() for path in tmp_path.rglob("log-x.csv")}
    assert logs == {"tiny": "1", "tiny-2": "2", "tiny-3": "3"}
    demo = ["train", "--preset", "demo", "--out", str(tmp_path)]
    assert "note" not in invoke(*demo).stdout
    assert f"note: overwriting {tmp_path / 'demo'}" in invoke(*demo).stdout
    assert not (tmp_path / "demo-2").exists()
    invoke(*demo, "--name", "tiny")
    assert (tmp_path / "tiny-4").is_dir()
    # One that was cut off before its first checkpoint is begun again in its place.
    assert "is kept" not in invoke(*words, "--resume").stdout
    assert (tmp_path / "tiny" / "log-x.csv").read_text() == "5"
    (tmp_path / "tiny" / "results.json").write_text("{}")
    assert "is kept" in invoke(*words, "--resume").stdout


def test_a_method_given_beside_a_preset_wins() -> None:
    preset = settings_of(["--preset", "demo"])
    both = settings_of(["--preset", "demo", "--method", "rigl", "--epochs", "3"])
    assert (preset.update_every, preset.distribution, preset.density) == (80, "uniform", 0.05)
    assert (both.update_every, both.distribution, both.growth) == (100, "erk", "gradient")
    assert (both.net, both.init, both.epochs) == (preset.net, preset.init, 3)


def test_costs_may_be_measured(tmp_path: Path) -> None:
    words = [*TINY.split(), "--out", str(tmp_path), "--cost", "time"]
    refused = invoke(*words)
    assert refused.exit_code == 1 and "--cost-weight or --cost-budget beside it" in refused.stderr
    done = invoke(*words, "--cost-budget", "start", "--update-every", "1")
    assert done.exit_code == 0, done.output
    assert "--cost time --flops-budget start" in (tmp_path / "tiny" / "reproduce.txt").read_text()


def test_a_report_of_nothing_is_one_line(tmp_path: Path) -> None:
    done = invoke("report", str(tmp_path))
    assert done.exit_code == 1 and "results.json: not there" in done.stderr
    empty = {"config": {}, "command": "", "machine": {}, "runs": [{}]}
    (tmp_path / "results.json").write_text(json.dumps(empty))
    done = invoke("report", str(tmp_path))
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit)
    assert "results.json: incomplete" in done.stderr


def test_info_describes_the_installation() -> None:
    done = invoke("info")
    assert done.exit_code == 0 and done.output.strip() == info.describe().strip()


def test_the_program_runs_as_a_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sparse_kernels.cli"]
    words = f"train --data mnist-sample --max-steps 2 --threads 1 --name p --out {tmp_path}".split()
    # `-m` looks into the working directory first: the package under test, installed or not.
    cwd = Path(report.__file__).parents[2]
    done = subprocess.run([*command, *words], capture_output=True, text=True, cwd=cwd, timeout=240)
    assert done.returncode == 0, done.stderr
    assert report.read_run(tmp_path / "p")["runs"][0]["steps"] == 2
    words = ["train", "--density", "2"]
    wrong = subprocess.run([*command, *words], capture_output=True, text=True, cwd=cwd, timeout=240)
    assert wrong.returncode == 1
    assert wrong.stderr.strip().splitlines() == [
        "Error: --density: expected a number above 0 and at most 1, got 2.0"
    ]
