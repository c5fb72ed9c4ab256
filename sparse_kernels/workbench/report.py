"""From results to what is read: a table, a figure, and the command that does it all again."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from . import account, figures, machine
from .errors import WorkbenchError
from .fetch import write_atomically
from .page import page

RESULTS, TABLE, FIGURE, REPRODUCE = "results.json", "table.md", "figure.png", "reproduce.txt"
PAGE = "report.html"
_MB = 1e6
_NOTE = (
    "A step: forward, backward, optimizer and masks. Its median hides the steps that gather "
    "the growth signal and the mask updates, its mean does not. An epoch and the training: "
    "batches too, evaluation not. Both contenders trained in turns of one epoch. "
    "+-: standard error over the seeds."
)


def write_run(folder: Path, results: dict[str, Any]) -> list[Path]:
    """Store ``results`` in ``folder`` and render everything; returns the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / RESULTS, json.dumps(results, indent=1))
    return [folder / RESULTS, *render(folder, results)]


def read_run(folder: Path) -> dict[str, Any]:
    """The results stored in ``folder``. Raises WorkbenchError if there are none, or broken ones."""
    path = folder / RESULTS
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WorkbenchError(
            f"{path}: not there; expected the directory of a finished `sparse-kernels train`, "
            "such as runs/<name>"
        ) from error
    except (OSError, ValueError) as error:
        raise WorkbenchError(
            f"{path}: cannot be read ({error}); run the experiment again"
        ) from error
    if (
        not isinstance(results, dict)
        or not {"config", "command", "machine", "runs"} <= results.keys()
        or not results["runs"]
    ):
        raise WorkbenchError(
            f"{path}: not the results of `sparse-kernels train`; run the experiment again"
        )
    return results


def render(folder: Path, results: dict[str, Any]) -> list[Path]:
    """Write table, figure (if matplotlib is there), a page that holds both, and reproduce.txt;
    returns the files written.
    """
    written = [folder / TABLE, folder / REPRODUCE, folder / PAGE]
    missing = figures.draw_run(results, folder / FIGURE)
    images = [] if missing else [folder / FIGURE]
    texts = table(results), reproduce(results), html_page(results, images)
    # Written when all could be made: no new table beside an old figure.
    for path, text in zip(written, texts, strict=True):
        _write(path, text)
    if missing:
        print(missing)
    return [*written, *images]


def render_again(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """Results stored in ``folder``, rendered; and the files written.

    Raises WorkbenchError if they are not there or lack what table and figure show.
    """
    results = read_run(folder)
    try:
        return results, render(folder, results)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise WorkbenchError(
            f"{folder / RESULTS}: incomplete or changed by hand ({type(error).__name__}: {error}); "
            "run the experiment again"
        ) from error


def _write(path: Path, text: str) -> None:
    def fill(file: BinaryIO) -> None:
        file.write(text.encode())

    write_atomically(path, fill)


def reproduce(results: dict[str, Any]) -> str:
    """The command, and the machine and versions it ran with."""
    lines = ["# The command (every setting spelled out):", results["command"], "", "# It ran on:"]
    lines += [f"# {key}: {value}" for key, value in results["machine"].items()]
    return "\n".join(lines) + "\n"


def table(results: dict[str, Any]) -> str:
    """Markdown: one row per measure, one column per contender, and dense over sparse."""
    head, *lines = _lines(results)
    marked = [_row(head), "|---|" + "---:|" * (len(head) - 1), *map(_row, lines)]
    config = results["config"]
    told = (
        f"**{config['net']} on {config['data']}**, density {100 * config['density']:g} %, block "
        f"{config['block']}, batch {config['batch_size']}, "
        f"seeds {', '.join(map(str, config['seeds']))}"
    )
    machine_line = machine.one_line(results["machine"])
    return "\n".join(
        [told, "", *marked, "", machine_line, "", _NOTE, "", f"`{results['command']}`", ""]
    )


def html_page(results: dict[str, Any], images: Sequence[Path]) -> str:
    """Table, figure and command as a page of their own."""
    config = results["config"]
    title = f"{config['net']} on {config['data']}, density {100 * config['density']:g} %"
    note = f"{_NOTE} {machine.one_line(results['machine'])}"
    return page(title, [_lines(results)], note, images, [results["command"]])


def _lines(results: dict[str, Any]) -> list[list[str]]:
    """The cells of the table, its head first."""
    by_contender: dict[str, list[dict[str, Any]]] = {}
    for run in results["runs"]:
        by_contender.setdefault(run["contender"], []).append(run)
    names = list(by_contender)
    baseline = results.get("dense_baseline")
    heads = [f"dense ({baseline['chosen']})" if n == "dense" and baseline else n for n in names]
    both = names == ["sparse", "dense"]
    lines = [["", *heads, *(["dense / sparse"] if both else [])]]
    for title, pick, show, ratio in _measures(results["runs"]):
        values = [[pick(run) for run in by_contender[name]] for name in names]
        cells = [_cell(column, show) for column in values]
        means = [statistics.fmean(column) for column in values]
        extra = [f"{means[1] / means[0]:.2f}x" if ratio and means[0] > 0 else ""] if both else []
        lines.append([title, *cells, *extra])
        if both and title == _TRAINING_TIME:
            lines.append(_time_to_dense(by_contender["sparse"], by_contender["dense"]))
    return lines


def _time_to_dense(sparse: list[dict[str, Any]], dense: list[dict[str, Any]]) -> list[str]:
    """The cells of a row: training time until a net is as accurate as its dense pair at the end.

    After each epoch, on the held-out data (without any: the test set); pairs share their seed.
    """
    pairs = [(run, other) for run in sparse for other in dense if run["seed"] == other["seed"]]
    ends = [figures.curve(other)[1][-1:] or [math.inf] for _, other in pairs]
    cells, means = [], []
    for runs in zip(*pairs, strict=True):
        times = [_first_time(run, end[0]) for run, end in zip(runs, ends, strict=True)]
        found = [time for time in times if time is not None]
        text = _cell(found, _show(1, 1, " s")) if found else "not reached"
        missed = f" ({len(times) - len(found)} of {len(times)} never)" if found else ""
        cells.append(text + (missed if len(found) < len(times) else ""))
        means.append(statistics.fmean(found) if len(found) == len(times) else None)
    cells = cells or ["", ""]
    ratio = f"{means[1] / means[0]:.2f}x" if means and means[0] and means[1] else ""
    return ["time to the dense net's accuracy at its end", *cells, ratio]


def _first_time(run: dict[str, Any], accuracy: float) -> float | None:
    """Training seconds of a run at the first epoch so accurate (in %); None: there is none."""
    seconds, reached, _ = figures.curve(run)
    return next((s for s, a in zip(seconds, reached, strict=True) if a >= accuracy), None)


def _show(scale: float, digits: int, unit: str) -> Callable[[float], str]:
    return lambda value: f"{value * scale:,.{digits}f}{unit}"


def _memory(part: str) -> Callable[[dict[str, Any]], float]:
    return lambda run: run["memory"][part]


# title, value of a run, how to show it, whether dense / sparse means something
_Measure = tuple[str, Callable[[dict[str, Any]], float], Callable[[float], str], bool]
_EXECUTED = "FLOPs density, executed (dense-masked layers count as dense)"
_TRAINING_TIME = "training time"
_MEASURES: list[_Measure] = [
    ("test accuracy", lambda run: run["test_accuracy"], _show(100, 2, " %"), False),
    ("test error", lambda run: 1 - run["test_accuracy"], _show(100, 2, " %"), False),
    ("usual step (median)", lambda run: run["step_seconds"], _show(1e3, 2, " ms"), True),
    (
        "mean step, signal and mask updates included",
        lambda run: run["mean_step_seconds"],
        _show(1e3, 2, " ms"),
        True,
    ),
    ("epoch (median)", lambda run: run["epoch_seconds"], _show(1, 2, " s"), True),
    (_TRAINING_TIME, lambda run: run["seconds"], _show(1, 1, " s"), True),
    ("weights", _memory("weights"), _show(1 / _MB, 3, " MB"), True),
    ("indices", _memory("indices"), _show(1 / _MB, 3, " MB"), False),
    ("gradients", _memory("gradients"), _show(1 / _MB, 3, " MB"), True),
    ("optimizer state", _memory("optimizer"), _show(1 / _MB, 3, " MB"), True),
    ("all four", _memory("total"), _show(1 / _MB, 3, " MB"), True),
    (account.SIGNAL_PARTS["signal"], _memory("signal"), _show(1 / _MB, 3, " MB"), False),
    (
        "all four and the growth signal, at most",
        _memory("total_with_signal"),
        _show(1 / _MB, 3, " MB"),
        True,
    ),
    ("weight density", lambda run: run["density"], _show(100, 2, " %"), False),
    (
        "FLOPs density, by existing weights",
        lambda run: run["flops_density"],
        _show(100, 2, " %"),
        False,
    ),
    (_EXECUTED, lambda run: run["executed_flops_density"], _show(100, 2, " %"), False),
]


_ADDED_LATER = {
    "mean step, signal and mask updates included",
    *(title for title, *_ in _MEASURES if "growth signal" in title),
    _EXECUTED,
}


def _measures(runs: list[dict[str, Any]]) -> list[_Measure]:
    """The rows that have something to say.

    Left out: executed FLOPs where no layer ended dense-masked, and what a results.json of an
    earlier version did not record.
    """
    same = all(run.get("executed_flops_density") in (None, run["flops_density"]) for run in runs)
    return [
        measure
        for measure in _MEASURES
        if not (same and measure[0] == _EXECUTED) and _is_recorded(measure, runs)
    ]


def _is_recorded(measure: _Measure, runs: list[dict[str, Any]]) -> bool:
    if measure[0] not in _ADDED_LATER:
        return True
    try:
        return all(measure[1](run) is not None for run in runs)
    except KeyError:
        return False


def _cell(values: list[float], show: Callable[[float], str]) -> str:
    text = show(statistics.fmean(values))
    if len(values) > 1:
        text += f" +- {show(statistics.stdev(values) / len(values) ** 0.5)}"
    return text


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
