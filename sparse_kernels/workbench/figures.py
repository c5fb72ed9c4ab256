"""The figure of a run: accuracy against the clock, and where the weights went; figures as such."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from . import machine

# Okabe and Ito's palette: told apart with every common kind of colour blindness.
_COLOURS = {"sparse": "#0072B2", "dense": "#D55E00"}
_MARKERS = {"sparse": "o", "dense": "s"}
_MISSING = (
    "no figure: matplotlib is not installed; `pip install matplotlib`, then `sparse-kernels "
    "report`, or the same benchmark again"
)


def draw_run(results: dict[str, Any], path: Path) -> str | None:
    """Draw ``results`` of a training run to ``path`` (PNG); returns why not, or None when drawn."""
    figure = new_figure((12, 4.6))
    if isinstance(figure, str):
        return figure
    left, right = figure.subplots(1, 2)
    _draw_accuracy(left, results)
    _draw_density(right, results)
    config = results["config"]
    figure.suptitle(
        f"{config['net']} on {config['data']}, {100 * config['density']:g} % of the weights"
    )
    figure.supxlabel(machine.one_line(results["machine"]), fontsize=7, color="0.35")
    save_figure(figure, path)
    return None


def new_figure(size: tuple[float, float]) -> Any:
    """A matplotlib figure of ``size`` inches, or, where matplotlib is missing, a text that says so.

    No pyplot: no global state, no display needed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return _MISSING
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write the figure to ``path`` (PNG), whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    figure.savefig(temporary, format="png", dpi=130)
    temporary.replace(path)


def curve(run: dict[str, Any]) -> tuple[list[float], list[float], str]:
    """Seconds, accuracy in % and of what: held-out data if there is any, else the test set."""
    held_out = run["epochs"][0]["validation_accuracy"] is not None
    key = "validation_accuracy" if held_out else "test_accuracy"
    points = [(e["seconds"], 100 * e[key]) for e in run["epochs"] if e[key] is not None]
    return [p[0] for p in points], [p[1] for p in points], "held-out" if held_out else "test"


def _label(name: str, runs: list[dict[str, Any]]) -> str:
    """Time of the whole training and final test accuracy, means over the seeds.

    Not a step's median: it would leave out the signal's steps and the mask updates.
    """
    own = [run for run in runs if run["contender"] == name]
    seconds = fmean(run["seconds"] for run in own)
    return f"{name}: {seconds:.3g} s, test {100 * fmean(r['test_accuracy'] for r in own):.2f} %"


def _draw_accuracy(axes: Any, results: dict[str, Any]) -> None:
    labelled: set[str] = set()
    every: list[float] = []
    kind = "test"
    for run in results["runs"]:
        name = run["contender"]
        seconds, accuracy, kind = curve(run)
        every += accuracy
        label = _label(name, results["runs"]) if name not in labelled else None
        labelled.add(name)
        # Few epochs deserve a mark each; many would hide the line.
        marker = _MARKERS[name] if len(seconds) <= 40 else None
        axes.plot(seconds, accuracy, color=_COLOURS[name], marker=marker, markersize=4, label=label)
    axes.set_xlabel("training time in seconds")
    axes.set_ylabel(f"{kind} accuracy in %")
    axes.set_title("Accuracy against the clock", fontsize=10)
    axes.margins(x=0.08)
    axes.set_xlim(left=0)
    if every:
        # The end of training is the question; a bad first epoch may leave the frame.
        floor = sorted(every)[len(every) // 20]
        axes.set_ylim(max(0.0, floor - 1.5), min(100.5, max(every) + 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)


def _draw_density(axes: Any, results: dict[str, Any]) -> None:
    axes.set_title("Density per layer over time", fontsize=10)
    sparse = [run for run in results["runs"] if run["contender"] == "sparse"]
    if sparse:
        draw_layers(axes, sparse[0])
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def draw_layers(axes: Any, run: dict[str, Any]) -> None:
    """Density of each layer over the epochs of a sparse run, and of the whole net."""
    from matplotlib import colormaps
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xlabel("epoch")
    axes.set_ylabel("density in %")
    axes.grid(alpha=0.3)
    epochs = [0, *(record["epoch"] for record in run["epochs"])]
    layers = [run["initial_layers"], *(record["layers"] for record in run["epochs"])]
    palette = colormaps["viridis"]  # ordered by depth, and readable in grey
    for i, layer in enumerate(run["layers"]):
        # Short of the palette's end, whose yellow is lost on white.
        colour = palette(0.85 * i / max(1, len(run["layers"]) - 1))
        rows, columns = layer["shape"]
        axes.plot(
            epochs,
            [100 * densities[layer["name"]] for densities in layers],
            color=colour,
            marker="." if len(epochs) <= 40 else None,
            linestyle=("-", "--", ":")[i % 3],
            label=f"{layer['name']} ({rows} x {columns})",
        )
    total = [100 * record["density"] for record in run["epochs"]]
    axes.plot(epochs[1:], total, color="black", linewidth=2.5, alpha=0.6, label="whole net")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
