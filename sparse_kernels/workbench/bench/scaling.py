"""How the gain scales: forward + backward of single layers over density, batch, width, threads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from .. import machine
from ..config import parse_block
from ..timing import interleave
from . import contest
from .results import Journal, markdown, milliseconds
from .shapes import LayerShape, choose

DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6)
BATCHES = (1, 8, 16, 32, 64, 128, 256)
WIDTHS = (32, 64, 128, 256, 512)
AXES = ("density", "batch", "width", "threads")
DEFAULT_LAYERS = ("vgg-128-128-16", "vgg-512-512-4", "linear-1024")
_MIN_SAMPLE = 0.01


@dataclass(frozen=True)
class Point:
    """One measurement: a layer and what holds for it; ``axis`` is what is being varied."""

    axis: str
    value: float
    shape: LayerShape
    density: float
    batch: int
    threads: int


def points(
    shapes: tuple[LayerShape, ...], axes: tuple[str, ...], density: float, batch: int, threads: int
) -> Iterator[Point]:
    """The points of all axes through one centre: ``density``, ``batch``, the layer, ``threads``."""
    for shape in shapes:
        if "density" in axes:
            for value in DENSITIES:
                yield Point("density", value, shape, value, batch, threads)
        if "batch" in axes:
            for count in BATCHES:
                yield Point("batch", count, shape, density, count, threads)
        if "width" in axes:
            for width in WIDTHS:
                wide = replace(shape, rows=width, columns=width)
                yield Point("width", width, wide, density, batch, threads)
        if "threads" in axes:
            counts = sorted({1, *(2**i for i in range(1, 8) if 2**i <= threads), threads})
            for count in counts:
                yield Point("threads", count, shape, density, batch, count)


def run(
    *,
    names: tuple[str, ...],
    axes: tuple[str, ...],
    density: float,
    block: str,
    batch_size: int,
    rounds: int,
    seconds: float,
    compiled: bool,
    journal: Journal,
) -> dict[str, Any]:
    """One row per point; ``seconds`` bounds the timed part of a point.

    Raises WorkbenchError for a layer whose results are not those of the masked dense layer.
    """
    shapes = choose(names or DEFAULT_LAYERS, "core")
    most, rows = torch.get_num_threads(), []
    for point in points(shapes, axes or AXES, density, batch_size, most):
        key = f"{point.shape.name} {point.axis} {point.value:g}"
        row = journal.row(
            key,
            lambda point=point: _measure(point, parse_block(block), rounds, seconds, compiled),  # type: ignore[misc]
        )
        print(f"{key:<36} {row['speedup']:6.2f}x", flush=True)
        rows.append(row)
    return {"rows": rows}


def _measure(
    point: Point, block: tuple[int, int], rounds: int, seconds: float, compiled: bool
) -> dict[str, Any]:
    before = torch.get_num_threads()
    torch.set_num_threads(point.threads)
    try:
        # The batch of the point counts, not the layer's own.
        shape = replace(point.shape, batch=point.batch)
        race = contest.set_up(shape, point.density, block, point.batch)
        sparse = contest.sparse_entry(race)
        race.admit(sparse)
        entries = [sparse, *contest.dense_entries(race, compiled)]
        calls = {e.name: e.both for e in entries if e.both is not None}
        timings = interleave(calls, rounds, 1, budget=seconds, min_seconds=_MIN_SAMPLE)
    finally:
        torch.set_num_threads(before)
    return {
        "axis": point.axis,
        "value": point.value,
        "layer": point.shape.name,
        "density": race.sparse.density,
        "batch": point.batch,
        "threads": point.threads,
        "errors": race.errors,
        "missing": race.missing,
        **contest.compare(timings),
    }


def break_even(rows: list[dict[str, Any]]) -> float | None:
    """Density at which sparse and dense take equally long, between the two points around it.

    Interpolated linearly in the ratio dense / sparse; None where they do not cross.
    """
    ordered = sorted(rows, key=lambda row: row["density"])
    for low, high in pairwise(ordered):
        a, b = low["speedup"], high["speedup"]
        if a >= 1 > b:
            share = (a - 1) / (a - b)
            return float(low["density"] + share * (high["density"] - low["density"]))
    return None


def tables(results: dict[str, Any]) -> str:
    """Markdown: one table per axis."""
    settings = results["settings"]
    lines = [
        f"Forward + backward of single layers around density {100 * settings['density']:g} %, "
        f"batch {settings['batch_size']}, block {settings['block']}; milliseconds, median "
        "[quartiles].",
        machine.one_line(results["machine"]),
        "",
    ]
    for axis in AXES:
        rows = [row for row in results["rows"] if row["axis"] == axis]
        if not rows:
            continue
        lines += markdown(
            ["layer", axis, "sparse", "best dense", "speedup"],
            [
                [row["layer"], f"{row['value']:g}", milliseconds(row["timings"]["sparse"]),
                 f"{milliseconds(row['timings'][row['dense_best']])} ({row['dense_best']})",
                 f"{row['speedup']:.2f}x"]
                for row in rows
            ],
        )  # fmt: skip
        lines.append("")
        if axis == "density":
            for layer in dict.fromkeys(row["layer"] for row in rows):
                even = break_even([row for row in rows if row["layer"] == layer])
                where = "not crossed here" if even is None else f"{100 * even:.0f} %"
                lines.append(f"Break-even density of {layer}: {where}.")
            lines.append("")
    return "\n".join(lines)
