"""Single layers, forward and forward with backward, against the best dense, with their roofline."""

from __future__ import annotations

import math
from typing import Any

from .. import machine
from ..config import parse_block
from ..timing import interleave
from . import contest, roofline
from .results import Journal, markdown, milliseconds
from .shapes import LayerShape, choose

_MIN_SAMPLE = 0.01  # seconds; layers of microseconds are called repeatedly


def run(
    *,
    names: tuple[str, ...],
    density: float,
    block: str,
    batch_size: int,
    rounds: int,
    seconds: float,
    compiled: bool,
    journal: Journal,
) -> dict[str, Any]:
    """Time the layers ``names`` (default: the whole list); plain data, one row per layer.

    ``seconds`` bounds the timed part of one layer. Raises WorkbenchError for an unknown layer or
    one whose results are not those of the masked dense layer.
    """
    shapes = choose(names, "all")
    ceiling = journal.row("ceiling", roofline.measure)
    rows = []
    for shape in shapes:
        row = journal.row(
            shape.name,
            lambda shape=shape: _measure(  # type: ignore[misc]
                shape, density, parse_block(block), batch_size, rounds, seconds, compiled, ceiling
            ),
        )
        print(_progress(row), flush=True)
        rows.append(row)
    return {"ceiling": ceiling, "rows": rows, "summary": summary(rows)}


def _measure(
    shape: LayerShape,
    density: float,
    block: tuple[int, int],
    batch_size: int,
    rounds: int,
    seconds: float,
    compiled: bool,
    ceiling: dict[str, Any],
) -> dict[str, Any]:
    race = contest.set_up(shape, density, block, batch_size)
    sparse = contest.sparse_entry(race)
    race.admit(sparse)
    entries = [sparse, *contest.dense_entries(race, compiled)]
    batch, nnz = race.x.shape[0], race.sparse.nnz
    row: dict[str, Any] = {
        "layer": shape.name,
        "net": shape.net,
        "shape": [shape.rows, shape.columns, shape.kernel, shape.size, shape.stride],
        "batch": batch,
        "nnz": nnz,
        "density": nnz / shape.weights,
        "wide_3x3": shape.is_wide_3x3,
        "errors": race.errors,
        "missing": race.missing,
    }
    for part, share in (("forward", 0.3), ("both", 0.7)):
        calls = {e.name: getattr(e, part) for e in entries}
        row[part] = contest.compare(
            interleave(calls, rounds, 1, budget=share * seconds, min_seconds=_MIN_SAMPLE)
        )
    both = row["both"]
    dense_seconds = both["timings"][both["dense_best"]]["median"]
    row["roofline"] = roofline.limits(shape, batch, nnz, dense_seconds, ceiling)
    row["met"] = both["speedup"] >= row["roofline"]["target"]
    return row


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Geometric means of the speedups, and how many layers meet their target."""

    def mean(chosen: list[dict[str, Any]], part: str) -> float | None:
        values = [math.log(row[part]["speedup"]) for row in chosen]
        return math.exp(sum(values) / len(values)) if values else None

    wide = [row for row in rows if row["wide_3x3"]]
    return {
        "geomean": mean(rows, "both"),
        "geomean_forward": mean(rows, "forward"),
        "geomean_wide_3x3": mean(wide, "both"),
        "wide_3x3": len(wide),
        "met": sum(row["met"] for row in rows),
        "layers": len(rows),
    }


def _progress(row: dict[str, Any]) -> str:
    timings, best = row["both"]["timings"], row["both"]["dense_best"]
    return (
        f"{row['layer']:<26} forward {row['forward']['speedup']:5.2f}x   forward + backward "
        f"{1e3 * timings['sparse']['median']:8.2f} ms, {best} "
        f"{1e3 * timings[best]['median']:8.2f} ms, {row['both']['speedup']:5.2f}x   "
        f"target {row['roofline']['target']:.2f}x"
    )


def tables(results: dict[str, Any]) -> str:
    """Markdown: one row per layer, then the means."""
    settings = results["settings"]
    lines = [
        f"Layers at density {100 * settings['density']:g} %, block {settings['block']}, batch "
        f"{settings['batch_size']} (ResNet-50: 32), up to {settings['rounds']} rounds in turns; "
        "milliseconds, median [quartiles].",
        f"{machine.one_line(results['machine'])}",
        "",
        *markdown(
            ["layer", "batch", "forward dense", "sparse", "speedup", "forward + backward dense",
             "sparse", "speedup", "roofline gain", "target", "met", "error"],
            [_cells(row) for row in results["rows"]],
        ),
        "",
        *_summary_lines(results["summary"]),
        "",
        f"Ceiling: {results['ceiling']['fma_per_second'] / 1e9:.1f} GFMA/s, "
        f"{results['ceiling']['bytes_per_second'] / 1e9:.1f} GB/s ({results['ceiling']['how']}). "
        f"Target: min({roofline.TARGET_SPEEDUP:g}x, {100 * roofline.TARGET_SHARE:g} % of the "
        "roofline gain). Error: the largest of output, dx and dvalues against the masked dense "
        "layer (float64 for small layers, float32 for large ones), all contenders alike.",
    ]  # fmt: skip
    for row in results["rows"]:
        lines += [f"{row['layer']}: no {name} ({why})." for name, why in row["missing"].items()]
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [row["layer"], str(row["batch"])]
    for part in ("forward", "both"):
        timings, best = row[part]["timings"], row[part]["dense_best"]
        cells += [
            f"{milliseconds(timings[best])} ({best})",
            milliseconds(timings["sparse"]),
            f"{row[part]['speedup']:.2f}x",
        ]
    limit = row["roofline"]
    return [
        *cells,
        f"{limit['roofline_gain']:.1f}x ({limit['bound']})",
        f"{limit['target']:.2f}x",
        "yes" if row["met"] else "no",
        f"{max(max(errors.values()) for errors in row['errors'].values()):.0e}",
    ]


def _summary_lines(summed: dict[str, Any]) -> list[str]:
    lines = [
        f"Geometric mean of forward + backward over all {summed['layers']} layers: "
        f"{summed['geomean']:.2f}x (forward {summed['geomean_forward']:.2f}x); "
        f"{summed['met']} of {summed['layers']} meet their target."
    ]
    if summed["wide_3x3"]:
        lines.append(
            f"Over the {summed['wide_3x3']} 3x3 layers of 64 channels and more: "
            f"**{summed['geomean_wide_3x3']:.2f}x**."
        )
    return lines
