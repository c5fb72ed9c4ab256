"""Sweeps: what is done is skipped, what failed is told."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from sweep_support import row

from sparse_kernels import cli
from sparse_kernels._cli_train import settings_of
from sparse_kernels.workbench import (
    models,
    session,
    sweep,
    sweep_children,
    sweep_lines,
    sweep_report,
)
from sparse_kernels.workbench.config import TrainConfig
from sparse_kernels.workbench.errors import WorkbenchError

FAST = ("--data", "mnist-sample", "--max-steps", "2", "--batch-size", "500")


def test_every_combination_once_and_seeds_outermost() -> None:
    found = sweep.tasks(["lenet-300-100"], ["rigl", "set"], [0.05, 0.1], [0, 1])
    assert len({task.name for task in found}) == 8 and [t.seed for t in found] == [0] * 4 + [1] * 4
    with pytest.raises(WorkbenchError, match="--method: expected some of sparse-momentum"):
        sweep.tasks(["lenet-300-100"], ["rigel"], [0.05], [0])
    with pytest.raises(WorkbenchError, match="--density: expected numbers above 0"):
        sweep.tasks(["lenet-300-100"], ["rigl"], [0.0], [0])
    # Twice the same run would be one of n = 2 without any spread.
    for methods, densities, seeds in (
        (["rigl"], [0.1], [0, 0]), (["rigl"] * 2, [0.1], [0]), (["rigl"], [0.1] * 2, [0])
    ):  # fmt: skip
        with pytest.raises(WorkbenchError, match="rigl-d0.1-s0 is asked for twice"):
            sweep.tasks(["lenet-300-100"], methods, densities, seeds)


def test_a_sweep_trains_skips_what_is_done_and_reports(tmp_path: Path) -> None:
    words = ["sweep", "--method", "static", "--method", "sparse-momentum", "--out", str(tmp_path),
             "--jobs", "2", "--", *FAST]  # fmt: skip
    done = CliRunner().invoke(cli.main, words)
    assert done.exit_code == 0, done.output
    lines = (tmp_path / "sweep.jsonl").read_text().splitlines()
    assert {json.loads(line)["method"] for line in lines} == {"static", "sparse-momentum"}
    assert all(json.loads(line)["steps"] == 2 for line in lines)
    # A line cut off is made again; a whole one is not.
    cut = lines[0] + "\n" + lines[1][:40]
    (tmp_path / "sweep.jsonl").write_text(cut)
    stamp = (tmp_path / "runs" / json.loads(lines[0])["name"] / "table.md").stat().st_mtime_ns
    again = CliRunner().invoke(cli.main, words)
    assert again.exit_code == 0 and "1 of 2 runs are done" in again.output
    rows = sweep_lines.read(tmp_path)
    assert len(rows) == 2 and rows[0] == json.loads(lines[0])
    assert rows[1]["test_accuracy"] == json.loads(lines[1])["test_accuracy"]
    path = tmp_path / "runs" / rows[0]["name"] / "table.md"
    assert path.stat().st_mtime_ns == stamp
    (tmp_path / "sweep-layers.png").unlink(missing_ok=True)
    told = CliRunner().invoke(cli.main, ["report", str(tmp_path)])
    assert told.exit_code == 0
    assert ("sweep-layers.png" in told.output) != ("matplotlib is not installed" in told.output)
    # Of another seed too: their mean would be of two settings. Another --data-dir is the same run.
    for seed, other in ((0, "lr=0.1, not 1.0"), (1, "lr=0.1, not 1.0")):
        changed = sweep.tasks(["lenet-300-100"], ["static"], [0.05], [seed], [*FAST, "--lr", "1"])
        with pytest.raises(WorkbenchError, match=f"made with {other} .* give another --out"):
            sweep.run(tmp_path, changed, 1, settings_of)
    moved = [*FAST, "--data-dir", "elsewhere", "--lr=0.1"]
    said: list[str] = []
    same = sweep.tasks(["lenet-300-100"], ["static"], [0.05], [0], moved)
    assert sweep.run(tmp_path, same, 1, settings_of, said.append) == []
    assert said == ["1 of 1 runs are done"]
    with sweep_lines.locked(tmp_path), pytest.raises(WorkbenchError, match="another sweep is at"):
        sweep.run(tmp_path, same, 1, settings_of)


def test_a_default_that_has_changed_is_another_setting(tmp_path: Path, monkeypatch) -> None:
    task, later = sweep.tasks(["lenet-300-100"], ["static"], [0.05], [0, 1], FAST)
    made = settings_of(task.words(tmp_path)[1:]).command()
    old = made.replace("--signal gradient", "--signal window")
    assert old != made
    (tmp_path / "sweep.jsonl").write_text(json.dumps({**row("static", 0, 0.9), **task.line(),
                                                      "command": old}) + "\n")  # fmt: skip
    monkeypatch.setattr(sweep_children, "_PROGRAM", "raise SystemExit('must not run')")
    with pytest.raises(WorkbenchError, match="made with signal='window', not 'gradient'"):
        sweep.run(tmp_path, [later], 1, settings_of)


def test_results_are_taken_only_from_the_run_that_was_asked_for(tmp_path: Path) -> None:
    words = ["sweep", "--method", "static", "--out", str(tmp_path), "--", *FAST]
    assert CliRunner().invoke(cli.main, words).exit_code == 0
    (made,) = sweep_lines.read(tmp_path)
    home = tmp_path / "runs" / made["name"]
    stamp = (home / "results.json").stat().st_mtime_ns
    for path in (tmp_path / "sweep.jsonl", *home.glob("checkpoints/*/*")):
        path.unlink()
    again = CliRunner().invoke(
        cli.main, words
    )  # its line and checkpoints are gone, its results not
    assert again.exit_code == 0 and sweep_lines.read(tmp_path) == [made]
    assert (home / "results.json").stat().st_mtime_ns == stamp
    assert [path.name for path in home.parent.iterdir()] == [made["name"]]
    (tmp_path / "sweep.jsonl").unlink()
    other = CliRunner().invoke(cli.main, [*words, "--lr", "1"])
    assert other.exit_code == 1 and "is of a run with lr=0.1, not 1.0" in other.output
    assert not sweep_lines.held(tmp_path)


def test_a_run_killed_in_its_first_checkpoint_is_begun_again_in_its_place(tmp_path: Path) -> None:
    words = ["train", *FAST, "--out", str(tmp_path), "--name", "run", "--resume"]
    begun = tmp_path / "run" / "checkpoints"
    (begun / ".writing-1").mkdir(parents=True)
    (begun / ".lock").touch()
    assert session.only_begun(tmp_path / "run")
    done = CliRunner().invoke(cli.main, words)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "results.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not session.only_begun(tmp_path / "run")


def test_runs_of_another_sweep_are_taken_over_by_their_settings(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    made = sweep.tasks(["lenet-300-100"], ["static"], [0.05], [0, 1], FAST)
    with (a / "sweep.jsonl").open("w") as file:
        for task in made:
            ran = row("static", task.seed, 0.9 + task.seed / 100)
            command = settings_of(task.words(a)[1:]).command()
            file.write(json.dumps({**ran, **task.line(), "command": command}) + "\n")
    # The same settings under other names: 0.9 is the default. A third seed is not there.
    for option, count in (("momentum=0.9", 2), ("momentum=0.8", 0)):
        variants = sweep.parse_variants([option], [])
        wanted = sweep.tasks(["lenet-300-100"], ["static"], [0.05], [0, 1, 2], FAST, variants)
        assert sweep.reuse(b, wanted, a, settings_of) == count
        assert sweep.reuse(b, wanted, a, settings_of) == 0  # nothing twice
    rows = sweep_lines.read(b)
    assert [r["seed"] for r in rows] == [0, 1] and {r["made_in"] for r in rows} == {str(a)}
    assert all(r["variant"] == "momentum=0.9" and r["name"].endswith("momentum=0.9") for r in rows)
    assert [r["test_accuracy"] for r in rows] == [0.9, 0.91]
    with pytest.raises(WorkbenchError, match="expected a sweep"):
        sweep.reuse(b, made, tmp_path / "none", settings_of)
    words = ["sweep", "--method", "static", "--seeds", "0,1", "--out", str(tmp_path / "c")]
    done = CliRunner().invoke(cli.main, [*words, "--reuse", str(a), "--", *FAST])
    assert done.exit_code == 0 and "2 runs taken over" in done.output, done.output
    assert "2 of 2 runs are done" in done.output


def test_wrong_settings_end_a_sweep_before_its_first_run(tmp_path: Path) -> None:
    words = ["sweep", "--variant", "prune-rate=0.2", "--variant", "prune-rate=2"]
    done = CliRunner().invoke(cli.main, [*words, "--out", str(tmp_path / "s"), "--", *FAST])
    assert done.exit_code == 1 and "prune-rate=2: --prune-rate: expected" in done.output
    words = ["sweep", "--variant", "prune-rat=0.2", "--out", str(tmp_path / "s")]
    done = CliRunner().invoke(cli.main, words)
    assert done.exit_code == 1 and "No such option" in done.output
    assert not (tmp_path / "s").exists()


def test_a_run_that_fails_is_told_and_leaves_no_line(tmp_path: Path) -> None:
    wanted = sweep.tasks(["lenet-300-100"], ["static"], [0.05], [0], ["--lr", "-1"])
    any_settings = TrainConfig()
    failures = sweep.run(tmp_path, wanted, 1, lambda words: any_settings, lambda text: None)
    assert len(failures) == 1 and "--lr" in failures[0]
    with pytest.raises(WorkbenchError, match="no such file|no finished run"):
        sweep_lines.read(tmp_path)
    # The report tells it, and counts it in no mean, until the run has been finished.
    name, words = wanted[0].name, "sparse-kernels train --out nowhere --name none"
    for seed in (1, 2):
        line = {**row("static", seed, 0.9), "command": words}
        sweep_lines.add(tmp_path, line)
    shown, _, _ = sweep_report.write(tmp_path)
    assert "| static | 2 (1 failed) | 10.00 +- 0.00 |" in shown
    assert f"{name} failed: exit code 1: " in (tmp_path / "sweep.md").read_text()
    sweep_lines.add(tmp_path, {**row("static", 0, 0.9), "name": name, "command": words})
    shown, _, _ = sweep_report.write(tmp_path)
    assert "| static | 3 |" in shown and "failed" not in (tmp_path / "sweep.md").read_text()


def test_one_run_is_one_seed_though_it_has_two_lines(tmp_path: Path) -> None:
    (tmp_path / "sweep.jsonl").write_text(2 * (json.dumps(row("set", 0, 0.9)) + "\n"))
    assert len(sweep_lines.read(tmp_path)) == 1


_SLEEPER = """
import json, pathlib, shlex, signal, sys, time
words = dict(zip(sys.argv, sys.argv[1:]))
out = pathlib.Path(words["--out"]) / words["--name"]
out.mkdir(parents=True)
def end(signum, frame):
    if words["--seeds"] != "0":
        sys.exit(143)
    run = dict.fromkeys(KEPT, 0.5) | {"contender": "sparse"}
    found = {"runs": [run], "machine": {},
             "command": shlex.join(["sparse-kernels", *sys.argv[1:-1]])}
    (out / "results.json").write_text(json.dumps(found))
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
(out / "started").touch()
time.sleep(60)
""".replace("KEPT", repr(sweep._KEPT))


@pytest.mark.parametrize(
    ("signum", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_starts_no_other_run_and_keeps_what_ended(
    signum, raised, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(sweep_children, "_PROGRAM", _SLEEPER)
    wanted = sweep.tasks(["lenet-300-100"], ["static"], [0.05], [0, 1, 2, 3])
    folders = [tmp_path / "runs" / task.name for task in wanted]

    def interrupt() -> None:
        while not all((folder / "started").exists() for folder in folders[:2]):
            time.sleep(0.01)
        os.kill(os.getpid(), signum)

    said: list[str] = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(raised):
            sweep.run(tmp_path, wanted, 2, settings_of, said.append)
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert [folder.exists() for folder in folders] == [True, True, False, False]
    assert [r["name"] for r in sweep_lines.read(tmp_path)] == [wanted[0].name]
    assert sum(text.startswith(f"{wanted[1].name}: stopped") for text in said) == 1
    assert not any(text.startswith("failed") for text in said)


def test_a_run_stopped_from_outside_has_not_failed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sweep_children, "_PROGRAM", "raise SystemExit(130)")
    said: list[str] = []
    wanted = sweep.tasks(["lenet-300-100"], ["static"], [0.05], [0])
    assert sweep.run(tmp_path, wanted, 1, settings_of, said.append) == []
    assert said[-1].startswith(f"{wanted[0].name}: stopped")
    (tmp_path / "sweep.jsonl").write_text(json.dumps({**row("set", 0, 0.9)}) + "\n")
    told = CliRunner().invoke(cli.main, ["sweep", "--method", "static", "--out", str(tmp_path)])
    assert told.exit_code == 1 and "1 runs were stopped; the same command goes on" in told.stderr


def test_variants_are_runs_of_their_own() -> None:
    found = sweep.parse_variants(["prune-rate=0.2,0.5"], ["signal=exact momentum=0.5", ""])
    assert found == [
        (("prune-rate", "0.2"),), (("prune-rate", "0.5"),),
        (("signal", "exact"), ("momentum", "0.5")), (),
    ]  # fmt: skip
    made = sweep.tasks(["lenet-300-100"], ["snfs"], [0.05], [0], FAST, found)
    assert len({task.name for task in made}) == 4
    words = made[2].words(Path("x"))
    assert words[words.index("--momentum") + 1] == "0.5" and words.index("--signal") > 0
    assert sweep.parse_variants([], []) == [()]
    for change in ({"variants": [(("density", "0.1"),)]}, {"options": ["--seed=3"]},
                   {"options": ["--threads", "2"]}, {"variants": [(("seed", "1"),)]}):  # fmt: skip
        with pytest.raises(WorkbenchError, match="is not to be changed run by run"):
            sweep.tasks(["lenet-300-100"], ["snfs"], [0.05], [0], **change)
    with pytest.raises(WorkbenchError, match="--name is not to be changed"):
        sweep.tasks(["wide-mlp name=x"], ["snfs"], [0.05], [0])
    (flag,) = sweep.parse_variants([], ["no-spare-dense momentum=0.5"])
    (task,) = sweep.tasks(["lenet-300-100"], ["snfs"], [0.05], [0], FAST, [flag])
    assert task.name.endswith("-no-spare-dense-momentum=0.5")
    assert task.line()["variant"] == "no-spare-dense momentum=0.5"
    settings = settings_of(task.words(Path("x"))[1:])
    assert (settings.spare_dense, settings.momentum) == (False, 0.5)
    (exact,) = sweep.tasks(["lenet-300-100"], ["snfs"], [1 / 12], [0], FAST)
    assert settings_of(exact.words(Path("x"))[1:]).density == 1 / 12
    for text in ("prune-rate", "=3", "prune-rate="):
        with pytest.raises(WorkbenchError, match="--vary: expected text such as"):
            sweep.parse_variants([text], [])


def test_nets_have_options_of_their_own(tmp_path: Path) -> None:
    narrow = "wide-mlp width=8 hidden-layers=1"
    (task,) = sweep.tasks([narrow], ["static"], [0.05], [0], FAST)
    assert task.name == "wide-mlp-width=8-hidden-layers=1-static-d0.05-s0"
    assert task.line()["net"] == narrow
    settings = settings_of(task.words(tmp_path)[1:])
    assert (settings.net, settings.net_options()) == ("wide-mlp", {"width": 8, "hidden_layers": 1})
    net = models.build(settings.net, **settings.net_options())
    assert [layer.out_features for layer in net[1::2]] == [8, 10]
    for text in ("wide-mlp width", "narrow-mlp width=8", " "):
        with pytest.raises(WorkbenchError, match="expected"):
            sweep.tasks([text], ["static"], [0.05], [0])[0].words(tmp_path)


def test_names_of_variants_are_names_that_train_takes() -> None:
    variants = sweep.parse_variants([], ["prune=groups:4 growth=groups:4", ""])
    rules, plain = sweep.tasks(["lenet-300-100"], ["snfs"], [0.05], [0], (), variants)
    assert rules.name == "lenet-300-100-snfs-d0.05-s0-prune=groups_4-growth=groups_4"
    assert plain.name == "lenet-300-100-snfs-d0.05-s0"
    words = rules.words(Path("x"))
    assert words[words.index("--prune") + 1] == "groups:4"
    TrainConfig(name=words[words.index("--name") + 1]).check()
    alike = sweep.parse_variants(["data-dir=a/b,a:b"], [])
    with pytest.raises(WorkbenchError, match="would both be called .*a_b"):
        sweep.tasks(["lenet-300-100"], ["snfs"], [0.05], [0], (), alike)
