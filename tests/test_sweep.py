"""Sweeps: what is done is skipped, what failed is told, tables and tests over seeds are right."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from sparse_kernels import cli
from sparse_kernels._cli_train import settings_of
from sparse_kernels.workbench import models, sweep, sweep_report, sweep_tables
from sparse_kernels.workbench.config import TrainConfig
from sparse_kernels.workbench.errors import WorkbenchError

FAST = ("--data", "mnist-sample", "--max-steps", "2", "--batch-size", "500")
MACHINE = {"cpu": "x", "isa": "y", "threads": 1, "torch": "2", "date": "2026-11-21",
           "sparse_kernels": "0", "commit": "c"}  # fmt: skip


def row(method: str, seed: int, accuracy: float, density: float = 0.05) -> dict:
    return {
        "name": f"lenet-{method}-{density}-{seed}", "net": "lenet-300-100", "method": method,
        "density_asked": density, "seed": seed, "options": [], "test_accuracy": accuracy,
        "seconds": 2.0 + seed, "mean_step_seconds": 0.1, "steps": 10, "density": density,
        "flops_density": density, "machine": MACHINE,
        "command": "sparse-kernels train '<&>' --out nowhere --name none",
    }  # fmt: skip


def test_every_combination_once_and_seeds_outermost() -> None:
    found = sweep.tasks(["lenet-300-100"], ["rigl", "set"], [0.05, 0.1], [0, 1])
    assert len({task.name for task in found}) == 8 and [t.seed for t in found] == [0] * 4 + [1] * 4
    with pytest.raises(WorkbenchError, match="--method: expected some of sparse-momentum"):
        sweep.tasks(["lenet-300-100"], ["rigel"], [0.05], [0])
    with pytest.raises(WorkbenchError, match="--density: expected numbers above 0"):
        sweep.tasks(["lenet-300-100"], ["rigl"], [0.0], [0])


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
    rows = sweep.read(tmp_path)
    assert len(rows) == 2 and rows[0] == json.loads(lines[0])
    assert rows[1]["test_accuracy"] == json.loads(lines[1])["test_accuracy"]
    path = tmp_path / "runs" / rows[0]["name"] / "table.md"
    assert path.stat().st_mtime_ns == stamp
    (tmp_path / "sweep-layers.png").unlink(missing_ok=True)
    told = CliRunner().invoke(cli.main, ["report", str(tmp_path)])
    assert told.exit_code == 0
    assert ("sweep-layers.png" in told.output) != ("matplotlib is not installed" in told.output)
    with pytest.raises(WorkbenchError, match="give another --out"):
        sweep.run(
            tmp_path, sweep.tasks(["lenet-300-100"], ["static"], [0.05], [0], ["--lr", "1"]), 1
        )


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
    rows = sweep.read(b)
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
    failures = sweep.run(tmp_path, wanted, 1, lambda text: None)
    assert len(failures) == 1 and "--lr" in failures[0]
    with pytest.raises(WorkbenchError, match="no finished run"):
        sweep.read(tmp_path)


_SLEEPER = """
import json, pathlib, signal, sys, time
words = dict(zip(sys.argv, sys.argv[1:]))
out = pathlib.Path(words["--out"]) / words["--name"]
out.mkdir(parents=True)
def end(signum, frame):
    if words["--seeds"] != "0":
        sys.exit(143)
    run = dict.fromkeys(KEPT, 0.5) | {"contender": "sparse"}
    found = {"runs": [run], "command": "c", "machine": {}}
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
    monkeypatch.setattr(sweep, "_PROGRAM", _SLEEPER)
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
            sweep.run(tmp_path, wanted, 2, said.append)
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert [folder.exists() for folder in folders] == [True, True, False, False]
    assert [r["name"] for r in sweep.read(tmp_path)] == [wanted[0].name]
    assert sum(text.startswith(f"{wanted[1].name}: stopped") for text in said) == 1
    assert not any(text.startswith("failed") for text in said)


def test_a_run_stopped_from_outside_has_not_failed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sweep, "_PROGRAM", "raise SystemExit(130)")
    said: list[str] = []
    wanted = sweep.tasks(["lenet-300-100"], ["static"], [0.05], [0])
    assert sweep.run(tmp_path, wanted, 1, said.append) == []
    assert said[-1].startswith(f"{wanted[0].name}: stopped")
    (tmp_path / "sweep.jsonl").write_text(json.dumps({**row("set", 0, 0.9)}) + "\n")
    told = CliRunner().invoke(cli.main, ["sweep", "--method", "static", "--out", str(tmp_path)])
    assert told.exit_code == 1 and "1 runs were stopped; the same command goes on" in told.stderr


def test_means_errors_and_paired_tests() -> None:
    stats = pytest.importorskip("scipy.stats", reason="the paired test is scipy's")
    ours, theirs = [0.95, 0.96, 0.97], [0.90, 0.93, 0.93]
    rows = [row("sparse-momentum", i, a) for i, a in enumerate(ours)]
    rows += [row("set", i, a) for i, a in enumerate(theirs)] + [row("set", 0, 0.5, 0.1)]
    head, *lines = sweep_tables.table(rows)
    found = {(line[1], line[2]): dict(zip(head, line, strict=True)) for line in lines}
    base = found["5 %", "sparse-momentum"]
    error = statistics.stdev([5.0, 4.0, 3.0]) / 3**0.5
    assert base["n"] == "3" and base["test error in %"] == f"4.00 +- {error:.2f}"
    other = found["5 %", "set"]
    assert other["error minus sparse-momentum"] == "+4.00 (n = 3)"
    p = stats.ttest_rel(theirs, ours).pvalue
    assert other["p (paired t)"] == f"{p:.3g}"
    head, line = sweep_tables.pooled(rows)
    over = dict(zip(head, line, strict=True))
    assert (over["method"], over["pairs"]) == ("set", "3")
    bound = 4.0 + stats.t.ppf(0.95, 2) * statistics.stdev([5.0, 3.0, 4.0]) / 3**0.5
    assert over["95 % bound"] == f"< {bound:+.3f}"
    assert over["error of sparse-momentum relative to it"] == f"{100 * (4 / 8 - 1):+.1f} %"
    lone = found["10 %", "set"]
    assert lone["test error in %"] == "50.00" and lone["p (paired t)"] == ""


def test_differences_that_cannot_be_tested_are_shown() -> None:
    pytest.importorskip("scipy.stats", reason="the paired test is scipy's")
    base = [row("sparse-momentum", seed, 0.75) for seed in (0, 1)]
    for others in ([row("set", 0, 0.5), row("set", 1, 0.5)], [row("set", 1, 0.5)]):
        rows, n = base + others, str(len(others))
        assert sweep_tables.table(rows)[-1][-2:] == [f"+25.00 (n = {n})", ""]
        assert sweep_tables.pooled(rows)[-1][1:] == ["set", n, "+25.000", "", "", "-50.0 %"]


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    rows = [row(m, s, 0.9 + s / 100) for m in ("set", "sparse-momentum") for s in (0, 1)]
    (tmp_path / "sweep.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    _, written, missing = sweep_report.write(tmp_path)
    page = (tmp_path / "sweep.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page) and "http" not in page
    assert "&lt;&amp;&gt;" in page and page.count("<tr>") == 5
    assert page.count("data:image/png;base64,") == (0 if missing else 2)
    assert all(path.is_file() for path in written)


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


def test_a_label_that_no_run_has_is_refused(tmp_path: Path) -> None:
    rows = [row("set", 0, 0.9), {**row("rigl", 0, 0.9), "variant": "prune-rate=0.5"}]
    (tmp_path / "sweep.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    told = CliRunner().invoke(cli.main, ["report", str(tmp_path), "--against", "rigl"])
    assert told.exit_code == 1
    assert "expected one of rigl prune-rate=0.5, set, got 'rigl'" in told.stderr
    assert CliRunner().invoke(cli.main, ["report", str(tmp_path)]).exit_code == 0
    assert (
        CliRunner().invoke(cli.main, ["report", str(tmp_path), "--against", "set"]).exit_code == 0
    )


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


def test_sensitivity_is_of_options_varied_alone(tmp_path: Path) -> None:
    rows = []
    for value, accuracy in (("0.5", 0.98), ("0.2", 0.96)):
        for seed in (0, 1):
            made = row("sparse-momentum", seed, accuracy + seed / 100)
            rows.append({**made, "name": f"{value}-{seed}", "variant": f"prune-rate={value}"})
    rows.append({**row("sparse-momentum", 0, 0.9), "variant": "signal=exact"})
    rows.append({**row("sparse-momentum", 0, 0.9), "variant": "signal=window momentum=0.5"})
    rows.append(row("sparse-momentum", 0, 0.97))
    (lines,) = sweep_tables.sensitivity(rows).values()
    (points,) = lines.values()
    assert [p[0] for p in points] == [0.2, 0.5]
    assert [p[1] for p in points] == pytest.approx([3.5, 1.5])
    assert [p[2] for p in points] == pytest.approx([0.5, 0.5])
    (tmp_path / "sweep.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    against = "sparse-momentum prune-rate=0.5"
    shown, written, missing = sweep_report.write(tmp_path, against)
    assert f"error minus {against}" in shown and "+2.00 (n = 2)" in shown
    assert missing or tmp_path / "sweep-sensitivity.png" in written
    head, *lines = sweep_tables.table(rows, against)
    found = {line[2]: dict(zip(head, line, strict=True)) for line in lines}
    assert found[against][head[-2]] == "" and set(found) == {
        against, "sparse-momentum prune-rate=0.2", "sparse-momentum signal=exact",
        "sparse-momentum signal=window momentum=0.5", "sparse-momentum",
    }  # fmt: skip
