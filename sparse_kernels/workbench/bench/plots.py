"""The figures of the benchmarks. Each returns why it was not drawn, or None."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import machine
from ..figures import new_figure, save_figure
from .contest import best_dense
from .networks import PART_NAMES
from .scaling import AXES

# Okabe and Ito's palette: told apart with every common kind of colour blindness.
BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, GREY, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#999999", "#000000",
)  # fmt: skip
_CYCLE = (BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, BLACK)
PART_COLOURS = dict(zip(PART_NAMES, (BLUE, SKY, ORANGE, YELLOW, GREEN, PINK, GREY), strict=True))
_MARKERS = "osD^vPX"
Draw = Callable[[Any, dict[str, Any]], None]


def _figure(
    results: dict[str, Any], path: Path, size: tuple[float, float], title: str, draw: Draw
) -> str | None:
    made = new_figure(size)
    if isinstance(made, str):
        return made
    made.suptitle(title, fontsize=11)
    made.supxlabel(machine.one_line(results["machine"]), fontsize=7, color="0.35")
    draw(made, results)
    save_figure(made, path)
    return None


def _subject(results: dict[str, Any]) -> str:
    settings = results["settings"]
    text = f"density {100 * settings['density']:g} %"
    return text + (f", block {settings['block']}" if "block" in settings else "")


def plain_grid(axes: Any, axis: str) -> None:
    """A pale grid along ``axis`` behind the marks, and no frame above and to the right."""
    axes.grid(axis=axis, alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def layer_speedups(results: dict[str, Any], path: Path) -> str | None:
    """Speedup of each layer, forward and forward + backward, and its target."""
    rows = results["rows"]

    def draw(figure: Any, _: dict[str, Any]) -> None:
        axes = figure.subplots()
        places = list(range(len(rows)))[::-1]
        for shift, part, colour, name in (
            (0.2, "forward", SKY, "forward"),
            (-0.2, "both", BLUE, "forward + backward"),
        ):
            values = [row[part]["speedup"] for row in rows]
            axes.barh([p + shift for p in places], values, 0.38, color=colour, label=name)
        targets = [row["roofline"]["target"] for row in rows]
        axes.plot(targets, [p - 0.2 for p in places], linestyle="", marker="|", markersize=9,
                  markeredgewidth=2, color=ORANGE, label="target, forward + backward")  # fmt: skip
        axes.axvline(1, color=BLACK, linewidth=1, label="as fast as dense")
        axes.set_yticks(places, [row["layer"] for row in rows], fontsize=8)
        axes.set_xlabel("times faster than the best dense layout")
        axes.set_xlim(left=0)
        axes.margins(y=0.01)
        plain_grid(axes, "x")
        figure.legend(fontsize=8, loc="outside upper right", ncols=4, frameon=False)

    size = (8.0, 1.8 + 0.3 * len(rows))
    return _figure(results, path, size, f"Single layers, {_subject(results)}", draw)


def roofline(results: dict[str, Any], path: Path) -> str | None:
    """Multiply-adds per second of each layer over multiply-adds per compulsory byte."""
    rows, ceiling = results["rows"], results["ceiling"]
    peak, band = ceiling["fma_per_second"] / 1e9, ceiling["bytes_per_second"] / 1e9

    def draw(figure: Any, _: dict[str, Any]) -> None:
        axes = figure.subplots()
        points: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            limit = row["roofline"]
            seconds = row["both"]["timings"]["sparse"]["median"]
            points.setdefault(row["net"], []).append(
                (limit["fma"] / limit["bytes"], limit["fma"] / seconds / 1e9)
            )
        every = [x for pairs in points.values() for x, _ in pairs]
        low, high = min(*every, peak / band) / 2, max(*every, peak / band) * 2
        corner = peak / band
        axes.plot([low, corner, high], [low * band, peak, peak], color=BLACK, linewidth=1.5,
                  label=f"{peak:.0f} GFMA/s, {band:.1f} GB/s (measured)")  # fmt: skip
        for i, (net, pairs) in enumerate(points.items()):
            axes.plot(*zip(*pairs, strict=True), linestyle="", marker=_MARKERS[i % 7],
                      color=_CYCLE[i % 7], label=net, markersize=6)  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("useful multiply-adds per compulsory byte")
        axes.set_ylabel("useful GFMA/s, forward + backward")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)

    title = f"Roofline of the sparse layers, {_subject(results)}"
    return _figure(results, path, (7.5, 5.2), title, draw)


def step_parts(results: dict[str, Any], path: Path) -> str | None:
    """Step time by part as stacked bars, one per contender; compiled ones whole."""
    timings, parts = results["timings"], results["parts"]
    best = timings[best_dense(timings)]["median"]

    def draw(figure: Any, _: dict[str, Any]) -> None:
        axes = figure.subplots()
        names = list(timings)
        places = list(range(len(names)))[::-1]
        for place, name in zip(places, names, strict=True):
            median = timings[name]["median"]
            left = 0.0
            for part in PART_NAMES if name in parts else ():
                width = 1e3 * parts[name][part]
                axes.barh(place, width, 0.7, left=left, color=PART_COLOURS[part])
                left += width
            if name not in parts:
                axes.barh(place, 1e3 * median, 0.7, color="0.85", edgecolor="0.5", hatch="//")
            axes.text(1e3 * median, place, f"  {1e3 * median:.1f} ms, {best / median:.2f}x",
                      va="center", fontsize=8)  # fmt: skip
        handles = [axes.barh(0, 0, color=colour) for colour in PART_COLOURS.values()]
        handles.append(axes.barh(0, 0, color="0.85", edgecolor="0.5", hatch="//"))
        axes.legend(handles, [*PART_NAMES, "compiled, not split"], fontsize=8, ncols=4,
                    loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)  # fmt: skip
        axes.set_yticks(places, names)
        axes.set_xlabel("milliseconds of a step (median); x: best dense step / this step")
        axes.set_xlim(0, 1.25e3 * max(t["median"] for t in timings.values()))
        plain_grid(axes, "x")

    net = results["settings"]["net"]
    title = f"A training step of {net}, {_subject(results)}"
    return _figure(results, path, (9.0, 2.4 + 0.45 * len(timings)), title, draw)


def epoch(results: dict[str, Any], path: Path) -> str | None:
    """Seconds since the epoch's begin over steps, for both contenders."""

    def draw(figure: Any, _: dict[str, Any]) -> None:
        draw_epoch(figure.subplots(), results)

    settings = results["settings"]
    title = f"One epoch of {settings['net']}, {_subject(results)}: {results['speedup']:.2f}x"
    return _figure(results, path, (7.0, 4.6), title, draw)


def draw_epoch(axes: Any, results: dict[str, Any]) -> None:
    """Seconds over steps of both contenders, the growth window shaded."""
    for name, colour in (("dense", ORANGE), ("sparse", BLUE)):
        steps, seconds = [0], [0.0]
        for row in results["blocks"]:
            steps.append(row["stop"])
            seconds.append(seconds[-1] + row[name]["seconds"])
        layout = results["dense_baseline"]["chosen"]
        label = f"{name if name == 'sparse' else f'dense ({layout})'}: {seconds[-1]:.1f} s"
        axes.plot(steps, seconds, color=colour, marker=".", label=label)
    start = results["steps"] - results["window_steps"]
    axes.axvspan(start, results["steps"], color="0.9", zorder=0,
                 label="growth window, then the mask update")  # fmt: skip
    axes.set_xlabel("step")
    axes.set_ylabel("seconds of training")
    axes.set_xlim(0, results["steps"])
    axes.set_ylim(bottom=0)
    plain_grid(axes, "both")
    axes.legend(fontsize=9)


def patterns(results: dict[str, Any], path: Path) -> str | None:
    """Speedup of a usual step on the pattern at the start and after mask updates."""

    def draw(figure: Any, _: dict[str, Any]) -> None:
        axes = figure.subplots()
        rows = results["rows"]
        labels = ["start" if r["updates"] == 0 else f"after {r['updates']}" for r in rows]
        bars = axes.bar(labels, [row["speedup"] for row in rows], 0.6, color=BLUE)
        axes.bar_label(bars, [f"{row['speedup']:.2f}x" for row in rows], fontsize=9)
        axes.axhline(1, color=BLACK, linewidth=1)
        axes.set_ylabel("times faster than the best dense step")
        axes.set_xlabel("mask updates")
        plain_grid(axes, "y")

    title = f"Steps of {results['settings']['net']} by pattern, {_subject(results)}"
    return _figure(results, path, (5.5, 4.2), title, draw)


def density(results: dict[str, Any], path: Path) -> str | None:
    """Speedup over density with the break-even line."""
    rows = [row for row in results["rows"] if row["axis"] == "density"]
    if not rows:
        return "no figure over density: the axis was not measured"

    def draw(figure: Any, _: dict[str, Any]) -> None:
        axes = figure.subplots()
        _curves(axes, rows, 100.0)
        axes.set_xlabel("density in %")

    title = (
        f"Forward + backward over density, batch {results['settings']['batch_size']}, block "
        f"{results['settings']['block']}"
    )
    return _figure(results, path, (7.0, 4.8), title, draw)


def scaling(results: dict[str, Any], path: Path) -> str | None:
    """Speedup over batch, width and threads, one panel each."""
    chosen = [a for a in AXES[1:] if any(row["axis"] == a for row in results["rows"])]
    if not chosen:
        return "no figure over batch, width and threads: these axes were not measured"

    def draw(figure: Any, _: dict[str, Any]) -> None:
        panels = figure.subplots(1, len(chosen), squeeze=False)[0]
        for axes, axis in zip(panels, chosen, strict=True):
            _curves(axes, [row for row in results["rows"] if row["axis"] == axis], 1.0)
            labels = {"batch": "batch", "width": "channels or features", "threads": "threads"}
            axes.set_xlabel(labels[axis])

    title = f"Forward + backward, {_subject(results)}"
    return _figure(results, path, (4.6 * len(chosen), 4.4), title, draw)


def _curves(axes: Any, rows: list[dict[str, Any]], scale: float) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for i, layer in enumerate(dict.fromkeys(row["layer"] for row in rows)):
        own = [row for row in rows if row["layer"] == layer]
        values, speedups = [scale * row["value"] for row in own], [row["speedup"] for row in own]
        style = {"marker": _MARKERS[i % 7], "color": _CYCLE[i % 7], "markersize": 5}
        axes.plot(values, speedups, label=layer, **style)
    axes.axhline(1, color=BLACK, linestyle="--", linewidth=1, label="break-even")
    axes.set_xscale("log")
    axes.set_yscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.set_xticks(sorted({scale * row["value"] for row in rows}))
    axes.xaxis.set_major_formatter(plain)
    axes.xaxis.set_minor_formatter(NullFormatter())
    speeds = [row["speedup"] for row in rows]
    ticks = [0.1, 0.2, 0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100]
    axes.set_yticks([t for t in ticks if 0.7 * min(*speeds, 1) <= t <= 1.4 * max(*speeds, 1)])
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("times faster than the best dense layout")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def peers(results: dict[str, Any], path: Path) -> str | None:
    """Speedup over the best dense of us and of every peer, per layer, forward + backward."""
    return _grouped(
        results, path, "layer", [(row["layer"], row["both"]) for row in results["rows"]],
        f"Peers, forward + backward, {_subject(results)}", ("sparseprop", "sparselab"),
    )  # fmt: skip


def inference(results: dict[str, Any], path: Path) -> str | None:
    """Speedup over eager and over the best dense inference, per net and batch."""
    rows = [(f"{row['net']}\nbatch {row['batch']}", row) for row in results["rows"]]
    title = f"Inference, {_subject(results)}"
    return _grouped(results, path, "net", rows, title, ())


def _grouped(
    results: dict[str, Any],
    path: Path,
    what: str,
    rows: list[tuple[str, dict[str, Any]]],
    title: str,
    others: tuple[str, ...],
) -> str | None:
    """Bars of the speedup over the best dense, for us and ``others``, grouped by row."""

    def draw(figure: Any, _: dict[str, Any]) -> None:
        axes = figure.subplots()
        names = ("sparse", *others)
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            heights = []
            for _label, row in rows:
                dense = row["timings"][row["dense_best"]]["median"]
                timing = _best_of(row["timings"], name)
                heights.append(dense / timing if timing else 0.0)
            places = [p + (i - (len(names) - 1) / 2) * width for p in range(len(rows))]
            ours = "sparse_kernels" if name == "sparse" else name
            bars = axes.bar(places, heights, width, color=_CYCLE[i], label=ours)
            axes.bar_label(bars, [f"{h:.1f}" if h else "" for h in heights], fontsize=7)
        axes.axhline(1, color=BLACK, linewidth=1, linestyle="--", label="the best dense")
        axes.set_xticks(range(len(rows)), [text for text, _row in rows], fontsize=8,
                        rotation=25 if what == "layer" else 0)  # fmt: skip
        axes.set_ylabel("times faster than the best dense")
        plain_grid(axes, "y")
        axes.legend(fontsize=8)

    return _figure(results, path, (2.5 + 0.9 * len(rows), 4.6), title, draw)


def _best_of(timings: dict[str, Any], name: str) -> float | None:
    found = [t["median"] for n, t in timings.items() if n == name or n.startswith(f"{name},")]
    return min(found) if found else None
