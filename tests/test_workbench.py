"""The training loop, its reports and the benchmarks, on small nets."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from workbench_support import SMALL

from sparse_kernels.workbench import loop, machine, models, report
from sparse_kernels.workbench.config import TrainConfig
from sparse_kernels.workbench.errors import WorkbenchError


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tests run side by side; threads would only wait for each other
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": 0.0}, "--density: expected .* got 0.0"),
        ({"density": 2.0}, "--density"),
        ({"density": float("nan")}, "--density"),
        ({"block": "4"}, "--block: expected .* got '4'"),
        ({"block": "0x1"}, "--block"),
        ({"net": "vgg"}, "unknown net 'vgg'"),
        ({"epochs": 0}, "--epochs"),
        ({"batch_size": 0}, "--batch-size"),
        ({"lr": float("inf")}, "--lr"),
        ({"seeds": ()}, "--seed"),
        ({"seeds": (1, 1)}, "--seed"),
        ({"threads": 0}, "--threads"),
        ({"max_steps": 0}, "--max-steps"),
        ({"holdout": 1.0}, "--holdout"),
        ({"prune_rate": 1.5}, "--prune-rate"),
        ({"signal": "psychic"}, "--signal"),
        ({"redistribution": "all"}, "--redistribution"),
        ({"name": "../up"}, "--name"),
        ({"dense_baseline": "fast"}, "--dense-baseline"),
    ],
)
def test_impossible_settings_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(WorkbenchError, match=message):
        dataclasses.replace(SMALL, **change).check()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Three epochs of six steps, sparse and dense, two seeds."""
    folder = tmp_path_factory.mktemp("run")
    results = loop.train(dataclasses.replace(SMALL, seeds=(0, 1)), folder)
    report.write_run(folder, results)
    return folder, results


def test_training_learns_conserves_and_updates_masks(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    _, results = finished
    assert [(r["seed"], r["contender"]) for r in results["runs"]] == [
        (0, "sparse"), (0, "dense"), (1, "sparse"), (1, "dense"),
    ]  # fmt: skip
    for run in results["runs"]:
        losses = [e["train_loss"] for e in run["epochs"]]
        assert losses[-1] < losses[0]
        assert run["steps"] == 18 and run["epochs"][-1]["step"] == 18
        seconds = [e["seconds"] for e in run["epochs"]]
        assert 0 < seconds[0] < seconds[1] < seconds[2] == run["seconds"]
        assert run["test_accuracy"] is not None
        assert all(e["validation_accuracy"] is not None for e in run["epochs"])
        assert [e["test_accuracy"] is None for e in run["epochs"]] == [True, True, False]
    for run in results["runs"][::2]:
        assert {round(e["density"], 9) for e in run["epochs"]} == {round(run["density"], 9)}
        assert run["density"] == pytest.approx(0.1, abs=1e-4)
        assert set(run["initial_layers"].values()) == {0.1}
        assert run["epochs"][0]["layers"] != run["initial_layers"]  # redistributed after step 4
        rates = [e["prune_rate"] for e in run["epochs"]]
        assert 0.5 > rates[0] > rates[1] > rates[2] == pytest.approx(0.005)
    assert {r["density"] for r in results["runs"][1::2]} == {1.0}


def test_equal_seeds_train_alike(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, compare=None, max_steps=7, threads=1)
    one, two = (loop.train(config, tmp_path)["runs"][0] for _ in range(2))
    for key in ("train_loss", "validation_accuracy", "layers"):
        assert [e[key] for e in one["epochs"]] == [e[key] for e in two["epochs"]]
    assert one["steps"] == 7 and len(one["epochs"]) == 2


def test_the_csv_log_has_a_row_per_epoch(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, results = finished
    for run in results["runs"]:
        path = folder / f"log-{run['contender']}-seed{run['seed']}.csv"
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
        for row, record in zip(rows, run["epochs"], strict=True):
            assert float(row["train_loss"]) == record["train_loss"]
            assert float(row["density:1"]) == record["layers"]["1"]
        assert rows[0]["test_accuracy"] == ""
        assert (rows[0]["prune_rate"] == "") == (run["contender"] == "dense")


def test_the_table_says_what_the_results_say(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, results = finished
    text = (folder / "table.md").read_text()
    sparse, dense = results["runs"][::2], results["runs"][1::2]

    def mean(runs: list[dict[str, Any]], key: str) -> float:
        return sum(run[key] for run in runs) / len(runs)

    cells = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]]
        for line in text.splitlines()
        if line.startswith("| ") and line.count("|") == 5
    }
    accuracy = cells["test accuracy"]
    assert accuracy[0].startswith(f"{100 * mean(sparse, 'test_accuracy'):.2f} % +- ")
    rows = {
        "usual step (median)": "step_seconds",
        "mean step, signal and mask updates included": "mean_step_seconds",
    }
    for title, key in rows.items():
        assert cells[title][2] == f"{mean(dense, key) / mean(sparse, key):.2f}x"
    signal, total = (
        sum(run["memory"][part] for run in sparse) / len(sparse) for part in ("signal", "total")
    )
    assert cells["growth signal, at most"][0].startswith(f"{signal / 1e6:.3f} MB")
    assert cells["growth signal, at most"][1].startswith("0.000 MB")
    both = f"{(total + signal) / 1e6:.3f} MB"
    assert cells["all four and the growth signal, at most"][0].startswith(both)
    assert cells["weight density"][1].startswith("100.00 %")
    assert "dense (contiguous)" in text
    assert (
        results["command"] in text and results["command"] in (folder / "reproduce.txt").read_text()
    )


def test_the_table_tells_when_the_dense_accuracy_is_reached(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    results = json.loads((finished[0] / "results.json").read_text())
    accuracies = {"sparse": (0.90, 0.96, 0.97), "dense": (0.80, 0.93, 0.95)}
    for run in results["runs"]:
        factor = 1.0 if run["contender"] == "sparse" else 4.0
        for i, (epoch, accuracy) in enumerate(
            zip(run["epochs"], accuracies[run["contender"]], strict=True)
        ):
            epoch |= {"validation_accuracy": accuracy, "seconds": factor * (i + 1)}

    def row() -> str:
        title = "| time to the dense net's accuracy"
        return next(x for x in report.table(results).splitlines() if x.startswith(title))

    assert row().endswith("| 2.0 s +- 0.0 s | 12.0 s +- 0.0 s | 6.00x |")
    results["runs"][0]["epochs"][1]["validation_accuracy"] = 0.5
    results["runs"][0]["epochs"][2]["validation_accuracy"] = 0.5
    assert row().endswith("| 2.0 s (1 of 2 never) | 12.0 s +- 0.0 s |  |")
    for run in results["runs"][::2]:
        run["epochs"][1]["validation_accuracy"] = run["epochs"][2]["validation_accuracy"] = 0.5
    assert row().endswith("| not reached | 12.0 s +- 0.0 s |  |")


def test_the_table_tells_executed_flops_where_they_differ(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    results = json.loads((finished[0] / "results.json").read_text())
    for run in results["runs"]:
        run["executed_flops_density"] = run["flops_density"]
    assert report._EXECUTED not in report.table(results)  # it would say nothing new
    results["runs"][0]["executed_flops_density"] = 0.75
    assert f"| {report._EXECUTED} |" in report.table(results)


def test_a_run_is_rendered_again_from_its_results(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, _ = finished
    (tmp_path / "results.json").write_text((folder / "results.json").read_text())
    written = report.render(tmp_path, report.read_run(tmp_path))
    assert (tmp_path / "table.md").read_text() == (folder / "table.md").read_text()
    page = (tmp_path / "report.html").read_text()
    assert page == (folder / "report.html").read_text() and "<td>training time</td>" in page
    assert page.count('src="data:image/png;base64,') == (tmp_path / "figure.png").exists()
    for run in (older := report.read_run(tmp_path))["runs"]:  # as the first version wrote it
        for key in ("mean_step_seconds", "executed_flops_density"):
            del run[key]
        del run["memory"]["signal"], run["memory"]["total_with_signal"]
    assert "mean step" not in report.table(older) and "usual step" in report.table(older)
    if (folder / "figure.png") in folder.iterdir():
        assert (tmp_path / "figure.png") in written
        assert (tmp_path / "figure.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_without_matplotlib_everything_but_the_figure_is_written(
    finished: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    written = report.render(tmp_path, finished[1])
    assert {p.name for p in written} == {"table.md", "reproduce.txt", "report.html"}
    assert "<img" not in (tmp_path / "report.html").read_text()
    assert "pip install matplotlib" in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "{", "[]", '{"runs": []}'])
def test_results_that_are_not_there_or_broken_are_named(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(WorkbenchError, match=r"results\.json: "):
        report.read_run(tmp_path)


def _emptied(results: dict[str, Any], what: str) -> None:
    if what == "no settings":
        results["config"] = {}
    elif what == "no measures":
        results["runs"] = [{"seed": 0, "contender": "sparse"}]
    elif what == "no run":
        results["runs"] = []
    elif what == "runs of text":
        results["runs"] = ["sparse"]
    elif what == "no accuracy":
        results["runs"][0]["test_accuracy"] = None
    elif what == "no machine":
        results["machine"] = None


@pytest.mark.parametrize(
    "what",
    ["no settings", "no measures", "no run", "runs of text", "no accuracy", "no machine"],
)
def test_results_without_content_are_named_and_change_no_file(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, what: str
) -> None:
    results = json.loads((finished[0] / "results.json").read_text())
    _emptied(results, what)
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(WorkbenchError, match=r"results\.json: .*run the experiment again"):
        report.render_again(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_net_and_data_must_match(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, net="vgg16-d")
    with pytest.raises(WorkbenchError, match="vgg16-d takes cifar10 images"):
        loop.train(config, tmp_path)


def test_the_header_tells_machine_versions_and_commit() -> None:
    head = machine.header()
    assert {"cpu", "isa", "threads", "torch", "python", "commit", "date"} <= head.keys()
    assert head["threads"] == torch.get_num_threads() and head["torch"] == torch.__version__
    json.dumps(head)
    assert head["cpu"] in machine.one_line(head)


def test_models_and_defaults_of_the_paper() -> None:
    vgg = TrainConfig(net="vgg16-d", **models.spec("vgg16-d").defaults)
    assert (vgg.epochs, vgg.batch_size, vgg.lr_decay_every, vgg.augment) == (250, 128, 30_000, True)
    lenet = TrainConfig(**models.spec("lenet-300-100").defaults)
    assert (lenet.epochs, lenet.batch_size, lenet.lr, lenet.lr_decay_every) == (
        100,
        100,
        0.1,
        25_000,
    )
    assert (lenet.momentum, lenet.weight_decay, lenet.holdout, lenet.prune_rate) == (
        0.9,
        5e-4,
        0.1,
        0.5,
    )
