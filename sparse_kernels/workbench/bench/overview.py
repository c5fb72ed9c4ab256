"""Figures made of results that lie on disk: README's, and the parts of a step before and after."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import machine
from ..errors import WorkbenchError
from ..figures import new_figure, save_figure
from .contest import best_dense
from .networks import PART_NAMES
from .plots import BLACK, BLUE, ORANGE, PART_COLOURS, draw_epoch, plain_grid

# What must be equal for the bars of two runs to stand side by side.
_SUBJECT = ("net", "density", "block", "batch_size")
_MACHINE = ("cpu", "threads", "isa")
_REST = "not split then"


def read(path: Path, *needed: str) -> dict[str, Any]:
    """Results of a benchmark from ``path`` (JSON) that have the keys ``needed``.

    Raises WorkbenchError for a file that is not there, is no JSON or lacks a key.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WorkbenchError(
            f"{path}: expected the JSON results of `sparse-kernels bench`, cannot be read ({error})"
        ) from error
    found = results.keys() if isinstance(results, dict) else ()
    missing = [key for key in ("machine", "settings", *needed) if key not in found]
    if missing:
        raise WorkbenchError(f"{path}: expected results with {', '.join(missing)}; it has none")
    return dict(results)


def parts(files: Sequence[Path], labels: Sequence[str], to: Path) -> str | None:
    """A sparse step by part, one bar per result of `bench networks`; why not drawn, or None.

    Each bar in per cent of the best dense step of its own run: absolute times of two runs do not
    compare. Raises WorkbenchError for results of different nets, settings or machines.
    """
    runs = [read(path, "timings", "parts") for path in files]
    for path, run in zip(files[1:], runs[1:], strict=True):
        for part, keys in (("settings", _SUBJECT), ("machine", _MACHINE)):
            for key in keys:
                if run[part].get(key) != runs[0][part].get(key):
                    raise WorkbenchError(
                        f"{path}: expected {key} {runs[0][part].get(key)} as in {files[0]}, got "
                        f"{run[part].get(key)}; their times do not make one figure"
                    )
    figure = new_figure((9.0, 2.2 + 0.6 * len(runs)))
    if isinstance(figure, str):
        return figure
    _draw_parts(figure.subplots(), runs, labels)
    settings = runs[0]["settings"]
    figure.suptitle(
        f"A sparse step of {settings['net']} by part, batch {settings['batch_size']}, density "
        f"{100 * settings['density']:g} %, block {settings['block']}", fontsize=11,
    )  # fmt: skip
    figure.supxlabel(machine.one_line(runs[-1]["machine"]), fontsize=7, color="0.35")
    save_figure(figure, to)
    return None


def _draw_parts(axes: Any, runs: list[dict[str, Any]], labels: Sequence[str]) -> None:
    colours = {**PART_COLOURS, _REST: "0.88"}
    longest = 0.0
    for place, run in enumerate(runs):
        timings = run["timings"]
        best = best_dense(timings)
        dense, sparse = timings[best]["median"], timings["sparse"]["median"]
        split, left = run["parts"]["sparse"], 0.0
        for part in (*PART_NAMES, "rest"):
            width = 100 * split.get(part, 0.0) / dense
            colour = colours[_REST if part == "rest" else part]
            axes.barh(-place, width, 0.6, left=left, color=colour)
            left += width
        axes.text(left, -place, f"  {1e3 * sparse:.0f} ms, dense ({best}) {1e3 * dense:.0f} ms: "
                  f"{dense / sparse:.2f}x", va="center", fontsize=9)  # fmt: skip
        longest = max(longest, left)
    used = [p for p in PART_NAMES if any(run["parts"]["sparse"].get(p) for run in runs)]
    if any("rest" in run["parts"]["sparse"] for run in runs):
        used.append(_REST)
    handles = [axes.barh(0, 0, color=colours[part]) for part in used]
    axes.figure.legend(handles, used, fontsize=8, ncols=4, loc="outside upper center",
                       frameon=False)  # fmt: skip
    axes.set_yticks([-place for place in range(len(runs))], labels)
    axes.set_xlim(0, 1.9 * longest)
    axes.set_xlabel("per cent of the best dense step of the same run (medians)")
    plain_grid(axes, "x")


def newest(folder: Path, kind: str, **wanted: Any) -> dict[str, Any]:
    """The newest result of ``kind`` in ``folder`` with these settings, by its own date.

    Runs with another allocator than the C library's (`machine.allocator_tag`) and tried-out short
    epochs do not count. Raises WorkbenchError if there is none.
    """
    found = []
    for path in sorted(folder.glob(f"{kind}-*.json")):
        results = read(path)
        settings = {"redistribution": "none", **results["settings"]}
        default = not machine.allocator_tag(results["machine"].get("environment", {}))
        whole = settings.get("max_steps") is None and not settings.get("names")
        if default and whole and all(settings.get(key) == wanted[key] for key in wanted):
            found.append(results)
    if not found:
        asked = ", ".join(f"{key} {value}" for key, value in wanted.items())
        raise WorkbenchError(
            f"{folder}: expected a result {kind}-*.json with {asked}, found none; run "
            f"`sparse-kernels bench` for it first, or name another folder"
        )
    return max(found, key=lambda results: str(results["machine"]["date"]))


def readme(folder: Path, to: Path) -> str | None:
    """README's figure: an epoch of VGG16-D against the clock, and the speedup of single layers.

    From the newest results in ``folder``, 5 % density, element blocks. Returns why it was not
    drawn, or None. Raises WorkbenchError if a result is missing.
    """
    same = {"density": 0.05, "block": "1x1", "batch_size": 128}
    epoch = newest(folder, "epoch", net="vgg16-d", redistribution="none", **same)
    layers = newest(folder, "layers", **same)
    figure = new_figure((12.0, 4.8))
    if isinstance(figure, str):
        return figure
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.6))
    draw_epoch(left, epoch)
    left.set_title(f"One epoch of VGG16-D, CIFAR-10: {epoch['speedup']:.2f}x", fontsize=10)
    _draw_layers(right, layers["rows"])
    mean = layers["summary"]["geomean"]
    right.set_title(f"{len(layers['rows'])} layers: geometric mean {mean:.2f}x", fontsize=10)
    figure.suptitle(
        "Training at 5 % density, float32, batch 128 (layers of ResNet-50: 32), against the best "
        "dense PyTorch", fontsize=11,
    )  # fmt: skip
    lines = {machine.one_line(results["machine"]): None for results in (epoch, layers)}
    figure.supxlabel("\n".join(lines), fontsize=7, color="0.35")
    save_figure(figure, to)
    return None


def _draw_layers(axes: Any, rows: list[dict[str, Any]]) -> None:
    nets = dict.fromkeys(row["net"] for row in rows)
    colours = dict(zip(nets, (BLUE, ORANGE, "#009E73", "#CC79A7"), strict=False))
    ordered = sorted(rows, key=lambda row: (list(nets).index(row["net"]), -row["both"]["speedup"]))
    for place, row in enumerate(ordered):
        axes.bar(place, row["both"]["speedup"], 0.8, color=colours.get(row["net"], "0.6"))
    axes.legend([axes.bar(0, 0, color=colours.get(net, "0.6")) for net in nets], list(nets),
                fontsize=8, frameon=False)  # fmt: skip
    axes.axhline(1, color=BLACK, linewidth=1, linestyle="--")
    axes.set_xticks(range(len(ordered)), [row["layer"] for row in ordered], fontsize=6, rotation=90)
    axes.set_ylabel("times faster, forward + backward")
    axes.margins(x=0.01)
    plain_grid(axes, "y")
