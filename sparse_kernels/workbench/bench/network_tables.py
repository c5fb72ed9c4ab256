"""The Markdown tables of whole nets: steps, patterns, an epoch."""

from __future__ import annotations

from typing import Any

from .. import account, machine
from . import nets
from .contest import best_dense
from .networks import PART_NAMES, SIGNAL
from .results import markdown, milliseconds


def _head(results: dict[str, Any], what: str) -> list[str]:
    settings = results["settings"]
    return [
        f"{what} of {settings['net']}, batch {settings['batch_size']}, density "
        f"{100 * settings['density']:g} %, block {settings['block']}, redistribution "
        f"{settings['redistribution']}.",
        machine.one_line(results["machine"]),
        "",
    ]


def steps(results: dict[str, Any]) -> str:
    """Steps: time by contender and part, memory, the mask update."""
    timings, best = results["timings"], best_dense(results["timings"])
    rows = []
    for name, timing in timings.items():
        parts = results["parts"].get(name)
        split = [f"{1e3 * parts[p]:.1f}" if parts else "" for p in PART_NAMES]
        ratio = timings[best]["median"] / timing["median"]
        rows.append([name, milliseconds(timing), f"{ratio:.2f}x", *split])
    rounds = min(timing["rounds"] for timing in timings.values())
    lines = [
        *_head(results, f"A training step ({rounds} in turns, milliseconds, median [quartiles])"),
        *markdown(["contender", "step", "best dense / this", *PART_NAMES], rows),
        "",
        *_missing(results["rejected"]),
        f"Conversions to feature-major per sparse step: {results['conversions_per_step']}. "
        f"{_density_line(results['densities'])}",
        _error_line(results["errors"]),
        "",
        *_memory_table(results, best),
        "",
        *_update_lines(results["update"]),
    ]
    return "\n".join(lines)


def _missing(rejected: dict[str, str]) -> list[str]:
    lines = [f"{name}: missing, does not run here ({reason})." for name, reason in rejected.items()]
    return [*lines, ""] if lines else []


def _density_line(found: dict[str, Any]) -> str:
    return (
        f"Weight density {100 * found['density']:.2f} %, FLOPs density "
        f"{100 * found['flops_density']:.2f} % (executed "
        f"{100 * found['executed_flops_density']:.2f} %)."
    )


def _error_line(errors: dict[str, float]) -> str:
    apart = ("rounding", nets.UNDETERMINED)
    listed = ", ".join(f"{kind} {error:.0e}" for kind, error in errors.items() if kind not in apart)
    lost = int(errors.get(nets.UNDETERMINED, 0))
    return (
        f"Against the masked dense net, relative: {listed}; dense against itself after a change "
        f"of its images' last bit: {errors['rounding']:.0e}."
        + (f" Weight gradients of {lost} layers were compared layer by layer only: in the whole "
           "net dense float32 misses those of float64 by more than 5 %." if lost else "")
    )  # fmt: skip


def _memory_table(results: dict[str, Any], best: str) -> list[str]:
    usual, signal, dense = (results["memory"][name] for name in ("sparse", SIGNAL, best))
    rows = [(part, usual[part], dense[part]) for part in account.PARTS]
    for part, title in account.SIGNAL_PARTS.items():
        rows.append((title, signal[part], dense[part]))
    peaks = results["peak_memory"]
    if peaks:
        (eager,) = (name for name in peaks if not name.startswith("sparse"))
        title = f"peak of the process, activations included (dense: {eager}), "
        rows.append((title + "usual steps", peaks["sparse"], peaks[eager]))
        rows.append((title + "signal and mask update", peaks[SIGNAL], peaks[eager]))
    cells = [
        [part, f"{ours / 1e6:.2f}", f"{theirs / 1e6:.2f}",
         f"{theirs / ours:.2f}x" if ours and theirs else ""]
        for part, ours, theirs in rows
    ]  # fmt: skip
    return markdown(["MB", "sparse", "dense", "dense / sparse"], cells)


def _update_lines(update: dict[str, float]) -> list[str]:
    if not update:
        return ["Mask update: not timed (too few steps)."]
    return [
        f"Mask update: {1e3 * update['update_seconds']:.1f} ms, "
        f"{100 * update['update_share']:.2f} % of an epoch of "
        f"{update['epoch_steps']} steps; gathering the growth signal in the last "
        f"{update['window_steps']} steps: {100 * update['signal_share']:.2f} %.",
        f"An epoch so computed (`--epoch` runs one): sparse {update['epoch_seconds']:.1f} s, "
        f"dense {update['dense_epoch_seconds']:.1f} s, "
        f"{update['epoch_speedup']:.2f}x.",
    ]


def patterns(results: dict[str, Any]) -> str:
    """Steps by pattern: at the start and after real mask updates."""
    rows = []
    for row in results["rows"]:
        timings, best, found = row["timings"], row["dense_best"], row["densities"]
        rows.append([
            "start" if row["updates"] == 0 else f"after {row['updates']}",
            milliseconds(timings["sparse"]),
            f"{milliseconds(timings[best])} ({best})",
            f"{row['speedup']:.2f}x",
            f"{100 * found['density']:.2f} %",
            f"{100 * found['flops_density']:.2f} %",
            f"{100 * min(found['layers'].values()):.2f} to "
            f"{100 * max(found['layers'].values()):.2f} %",
        ])  # fmt: skip
    last = results["rows"][-1]
    return "\n".join([
        *_head(results, "Usual steps by pattern (milliseconds, median [quartiles])"),
        *markdown(["mask updates", "sparse", "best dense", "speedup", "weight density",
                   "FLOPs density", "density by layer"], rows),
        "",
        f"The lowest counts: **{results['speedup']:.2f}x**. Trained on {last['data']}.",
        *_missing(last["rejected"]),
        _error_line(last["errors"]),
    ])  # fmt: skip


def epoch(results: dict[str, Any]) -> str:
    """A whole epoch: seconds, speedup, what the window and the update cost."""
    seconds, window = results["seconds"], results["window_steps"]
    last = results["blocks"][-1]
    usual = results["usual_speedup"]
    rows = [
        ["whole epoch", f"{results['steps']}", f"{seconds['sparse']:.2f}",
         f"{seconds['dense']:.2f}", f"**{results['speedup']:.2f}x**"],
        ["of it, growth window and mask update", str(window), f"{last['sparse']['seconds']:.2f}",
         f"{last['dense']['seconds']:.2f}", f"{results['window_speedup']:.2f}x"],
    ]  # fmt: skip
    lines = [
        *_head(results, "One epoch, from the loader's batch to updated weights (seconds)"),
        *markdown(
            [
                "",
                "steps",
                "sparse",
                f"dense ({results['dense_baseline']['chosen']})",
                "dense / sparse",
            ],
            rows,
        ),
        "",
    ]
    if usual:
        lines.append(
            f"Blocks of usual steps: {usual['median']:.2f}x, quartiles {usual['low']:.2f} to "
            f"{usual['high']:.2f} ({usual['rounds']} blocks)."
        )
    return "\n".join([
        *lines,
        f"The mask update itself: {1e3 * results['update_seconds']:.0f} ms. Data: "
        f"{results['data']}, no augmentation.",
        "After the epoch: " + _density_line(results["densities"]),
        _error_line(results["errors"]),
        *_missing(results["dense_baseline"]["rejected"]),
        *(["Interrupted and resumed from the last block."] if results["resumed"] else []),
    ])  # fmt: skip
