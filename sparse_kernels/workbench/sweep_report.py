"""Files of a sweep: its tables as Markdown, figures as PNG, and one HTML page that holds both."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from . import figures, machine, sweep_lines
from .errors import WorkbenchError
from .page import page
from .sweep_tables import (
    Row,
    error_of,
    grouped,
    label_of,
    pooled,
    sensitivity,
    standard_error,
    table,
)

_NOTE = (
    "+-: standard error over the seeds. 95 % bound: the mean difference lies below it with 95 % "
    "confidence (one-sided t over pairs, one per seed, each the mean over its densities). "
)
_PANELS = 16
"""More do not fit into a picture that can be read."""

_FIGURES = (
    ("density", "density_asked", 100.0, "density in %", "Test error over density"),
    ("time", "seconds", 1.0, "training time in seconds", "Test error over training time"),
)


def write(folder: Path, against: str | None = None) -> tuple[str, list[Path], str | None]:
    """Tables as Markdown, figures as PNG, and one HTML page that holds both and needs no network.

    against: a label; None: sparse-momentum, and no differences where no run has it.
    Returns the tables, the files written, and why figures are missing (None: they are there).
    Raises WorkbenchError for a label that no run has.
    """
    rows, failed = sweep_lines.read(folder), sweep_lines.failures(folder)
    labels = sorted({label_of(row) for row in rows})
    if against is not None and against not in labels:
        raise WorkbenchError(f"--against: expected one of {', '.join(labels)}, got {against!r}")
    base = against or "sparse-momentum"
    tables = [lines for lines in (table(rows, base, failed), pooled(rows, base)) if len(lines) > 1]
    markdown = "\n\n".join(_markdown(lines) for lines in tables)
    lost = "".join(f"{row['name']} failed: {row['reason']}. " for row in failed)
    note = _NOTE + lost + machine.several([row["machine"] for row in rows])
    written, missing = [folder / "sweep.md"], None
    written[0].write_text(f"{markdown}\n\n{note}\n", encoding="utf-8")
    for name, key, scale, label, title in _FIGURES:
        missing = _draw(rows, key, scale, label, title, folder / f"sweep-{name}.png")
        if missing is None:
            written.append(folder / f"sweep-{name}.png")
    if missing is None:
        more = {
            "sensitivity": lambda path: _draw_sensitivity(rows, path),
            "layers": lambda path: _draw_layers(rows, folder, path),
        }
        paths = {folder / f"sweep-{name}.png": draw for name, draw in more.items()}
        written += [path for path, draw in paths.items() if draw(path)]
    file = folder / "sweep.html"
    commands = [row["command"] for row in rows]
    file.write_text(page("Sweep", tables, note, written[1:], commands), encoding="utf-8")
    return markdown, [*written, file], missing


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * len(lines[0]), *rows[1:]])


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
        lowest = math.inf
        for i, name in enumerate(names):
            points = []
            for (own, _, called), group in grouped(rows).items():
                if (own, called) == (net, name):
                    errors = [error_of(row) for row in group]
                    where = scale * statistics.fmean(row[key] for row in group)
                    mean = statistics.fmean(errors)
                    points.append((where, mean, standard_error(errors)))
            if points:
                xs, ys, bars = zip(*sorted(points), strict=True)
                lowest = min(lowest, *(y - bar for y, bar in zip(ys, bars, strict=True)))
                colour = colormaps["tab10"](i % 10)
                axes.errorbar(xs, ys, bars, color=colour, marker="osv^D"[i % 5], label=name)
        axes.set(xlabel=label, ylabel="test error in %", title=f"{title}: {net}")
        # A method that fails must not press all others into one line; 0 % has no logarithm.
        axes.set_yscale("log" if lowest > 0 else "linear")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figures.save_figure(figure, path)
    return None


def _draw_sensitivity(rows: Sequence[Row], path: Path) -> bool:
    """Test error over each option that was varied; False where none was."""
    found = sensitivity(rows)
    if not found:
        return False
    figure = figures.new_figure((6.0 * len(found), 4.4))
    # One scale of errors: panels of their own would make noise look as large as an effect.
    panels = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for axes, (option, lines) in zip(panels, found.items(), strict=True):
        for i, (name, points) in enumerate(lines.items()):
            xs, ys, bars = zip(*points, strict=True)
            axes.errorbar(xs, ys, bars, marker="osv^D"[i % 5], label=name)
        axes.set(xlabel=option, ylabel="test error in %", title=f"Sensitivity to {option}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figures.save_figure(figure, path)
    return True


def _draw_layers(rows: Sequence[Row], folder: Path, path: Path) -> bool:
    """Where the weights went: density per layer over the epochs, a panel per net, density and
    label, of the first seed whose results are at hand; False where none are.
    """
    found = []
    for (net, density, name), members in grouped(rows).items():
        results = (sweep_lines.sparse_run(folder, row) for row in members)
        first = next((run for run in results if run is not None), None)
        if first is not None:
            found.append((f"{net}, {100 * density:g} %\n{name}", first))
    if not found:
        return False
    shown = found[:_PANELS]
    columns = min(4, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure = figures.new_figure((4.4 * columns, 3.6 * lines))
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for axes, (title, run) in zip(panels, shown, strict=False):
        figures.draw_layers(axes, run)
        axes.set_title(title, fontsize=9)
        axes.legend(fontsize=6)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    rest = f", {len(shown)} of {len(found)}" if len(found) > len(shown) else ""
    figure.suptitle(f"Density per layer over time, first seed{rest}")
    figures.save_figure(figure, path)
    return True
