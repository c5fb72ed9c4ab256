"""Tables and figures of a sweep: mean +- standard error, n, and tests over pairs of one seed."""

from __future__ import annotations

import base64
import html
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import figures, machine, sweep
from .errors import WorkbenchError

Row = dict[str, Any]
_FIGURES = (
    ("density", "density_asked", 100.0, "density in %", "Accuracy over density"),
    ("time", "seconds", 1.0, "training time in seconds", "Accuracy over training time"),
)


def label_of(row: Row) -> str:
    """The method, and what the run has otherwise."""
    return f"{row['method']} {row.get('variant', '')}".strip()


def grouped(rows: Sequence[Row]) -> dict[tuple[str, float, str], list[Row]]:
    """Rows by (net, density, label), each group in order of its seeds."""
    groups: dict[tuple[str, float, str], list[Row]] = {}
    for row in sorted(rows, key=lambda r: (r["net"], r["density_asked"], r["seed"])):
        groups.setdefault((row["net"], row["density_asked"], label_of(row)), []).append(row)
    return groups


def paired(mine: Sequence[Row], other: Sequence[Row]) -> tuple[int, float, float] | None:
    """Over the seeds that both have: their number, the mean difference of test error, and p.

    p: two-sided, of the paired t-test. None for fewer than two pairs, and where all differences
    are equal, for which the test says nothing. Raises ImportError without scipy.
    """
    theirs = {row["seed"]: row["test_accuracy"] for row in other}
    pairs = [(r["test_accuracy"], theirs[r["seed"]]) for r in mine if r["seed"] in theirs]
    differences = [b - a for a, b in pairs]
    if len(pairs) < 2 or max(differences) == min(differences):
        return None
    from scipy.stats import ttest_rel

    p = float(ttest_rel([a for a, _ in pairs], [b for _, b in pairs]).pvalue)
    return len(pairs), statistics.fmean(differences), p


def table(rows: Sequence[Row], against: str = "sparse-momentum") -> list[list[str]]:
    """Head and lines: a line per net, density and label; `against` is a label."""
    head = ["net", "density", "method", "n", "test error in %", "training in s", "FLOPs density",
            f"error minus {against}", "p (paired t)"]  # fmt: skip
    lines, groups = [head], grouped(rows)
    for (net, density, name), members in groups.items():
        errors = [100 * (1 - row["test_accuracy"]) for row in members]
        seconds = [row["seconds"] for row in members]
        flops = statistics.fmean(row["flops_density"] for row in members)
        base = groups.get((net, density, against))
        test = None
        if base is not None and name != against:
            try:
                test = paired(members, base)
            except ImportError:
                head[-1] = "p (needs scipy)"
        lines.append([net, f"{100 * density:g} %", name, str(len(members)), _spread(errors, 2),
                      _spread(seconds, 1), f"{100 * flops:.2f} %",
                      "" if test is None else f"{100 * test[1]:+.2f} (n = {test[0]})",
                      "" if test is None else f"{test[2]:.3g}"])  # fmt: skip
    return lines


def _spread(values: Sequence[float], digits: int) -> str:
    text = f"{statistics.fmean(values):.{digits}f}"
    if len(values) > 1:
        text += f" +- {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}"
    return text


def write(folder: Path, against: str | None = None) -> tuple[str, list[Path], str | None]:
    """Table as Markdown, figures as PNG, and one HTML page that holds both and needs no network.

    against: a label; None: sparse-momentum, and no differences where no run has it.
    Returns the table, the files written, and why figures are missing (None: they are there).
    Raises WorkbenchError for a label that no run has.
    """
    rows = sweep.read(folder)
    labels = sorted({label_of(row) for row in rows})
    if against is not None and against not in labels:
        raise WorkbenchError(f"--against: expected one of {', '.join(labels)}, got {against!r}")
    lines = table(rows, against or "sparse-momentum")
    markdown = "\n".join(
        ["| " + " | ".join(lines[0]) + " |", "|" + "---|" * len(lines[0])]
        + ["| " + " | ".join(line) + " |" for line in lines[1:]]
    )
    note = "+-: standard error over the seeds. " + machine.one_line(rows[0]["machine"])
    written, missing = [folder / "sweep.md"], None
    written[0].write_text(f"{markdown}\n\n{note}\n", encoding="utf-8")
    for name, key, scale, label, title in _FIGURES:
        missing = _draw(rows, key, scale, label, title, folder / f"sweep-{name}.png")
        if missing is None:
            written.append(folder / f"sweep-{name}.png")
    if missing is None and _draw_sensitivity(rows, folder / "sweep-sensitivity.png"):
        written.append(folder / "sweep-sensitivity.png")
    page = folder / "sweep.html"
    page.write_text(_page(lines, note, rows, written[1:]), encoding="utf-8")
    return markdown, [*written, page], missing


def _draw(
    rows: Sequence[Row], key: str, scale: float, label: str, title: str, path: Path
) -> str | None:
    nets = sorted({row["net"] for row in rows})
    figure = figures.new_figure((6.0 * len(nets), 4.4))
    if isinstance(figure, str):
        return figure
    from matplotlib import colormaps

    names = sorted({label_of(row) for row in rows})
    for axes, net in zip(figure.subplots(1, len(nets), squeeze=False)[0], nets, strict=True):
        for i, name in enumerate(names):
            points = []
            for (own, _, called), group in grouped(rows).items():
                if (own, called) == (net, name):
                    accuracy = [100 * row["test_accuracy"] for row in group]
                    spread = statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0
                    where = scale * statistics.fmean(row[key] for row in group)
                    mean = statistics.fmean(accuracy)
                    points.append((where, mean, spread / math.sqrt(len(accuracy))))
            if points:
                xs, ys, bars = zip(*sorted(points), strict=True)
                colour = colormaps["tab10"](i % 10)
                axes.errorbar(xs, ys, bars, color=colour, marker="osv^D"[i % 5], label=name)
        axes.set(xlabel=label, ylabel="test accuracy in %", title=f"{title}: {net}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figures.save_figure(figure, path)
    return None


def sensitivity(rows: Sequence[Row]) -> dict[str, dict[str, list[tuple[float, float, float]]]]:
    """By option, where it alone was varied over numbers: per net, density and method (value, mean
    test error in %, its standard error or 0), by value.
    """
    found: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for (net, density, _), members in grouped(rows).items():
        option, equals, text = members[0].get("variant", "").partition("=")
        try:
            value = float(text)
        except ValueError:
            continue
        if not equals:
            continue
        errors = [100 * (1 - row["test_accuracy"]) for row in members]
        spread = statistics.stdev(errors) / math.sqrt(len(errors)) if len(errors) > 1 else 0.0
        line = f"{members[0]['method']}, {net}, {100 * density:g} %"
        point = (value, statistics.fmean(errors), spread)
        found.setdefault(option, {}).setdefault(line, []).append(point)
    return {option: {k: sorted(v) for k, v in lines.items()} for option, lines in found.items()}


def _draw_sensitivity(rows: Sequence[Row], path: Path) -> bool:
    """Test error over each option that was varied; False where none was."""
    found = sensitivity(rows)
    if not found:
        return False
    figure = figures.new_figure((6.0 * len(found), 4.4))
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (option, lines) in zip(panels, found.items(), strict=True):
        for i, (name, points) in enumerate(lines.items()):
            xs, ys, bars = zip(*points, strict=True)
            axes.errorbar(xs, ys, bars, marker="osv^D"[i % 5], label=name)
        axes.set(xlabel=option, ylabel="test error in %", title=f"Sensitivity to {option}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figures.save_figure(figure, path)
    return True


def _page(
    lines: Sequence[Sequence[str]], note: str, rows: Sequence[Row], images: Sequence[Path]
) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    body = [row(lines[0], "th"), *(row(line, "td") for line in lines[1:])]
    pictures = [
        f'<img alt="{path.stem}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}">'
        for path in images
    ]
    commands = [f"<li><code>{html.escape(r['command'])}</code></li>" for r in rows]
    style = (
        "body{font:15px sans-serif;margin:2em;max-width:75em}table{border-collapse:collapse}"
        "td,th{border:1px solid #bbb;padding:.2em .6em;text-align:left}img{max-width:100%}"
    )
    return "\n".join(
        ["<!doctype html>", '<html lang="en"><head><meta charset="utf-8"><title>Sweep</title>',
         f"<style>{style}</style></head><body>", "<h1>Sweep</h1>", "<table>", *body, "</table>",
         f"<p>{html.escape(note)}</p>", *pictures, "<h2>Commands</h2>", "<ol>", *commands, "</ol>",
         "</body></html>", ""]
    )  # fmt: skip
