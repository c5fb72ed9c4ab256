"""What each growth signal costs: steps outside and inside of its window, mask updates, bytes.

One net per signal, all from one seed and on one batch, step by step in turns. "exact" has no step
outside of its window, "random" none inside.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from .. import machine
from ..config import SIGNALS, TrainConfig
from ..contenders import Contender, build_sparse
from .nets import epoch_steps, random_batch

_OUTSIDE, _OPENING, _INSIDE = "outside", "opening", "inside"
_PARTS = (_OUTSIDE, _OPENING, _INSIDE)


def run(config: TrainConfig, *, updates: int, update_every: int) -> dict[str, Any]:
    """Rows per signal over `updates` mask updates, `update_every` steps apart; medians in seconds.

    opening: the step after which a window opens, what "sampled" draws then included.
    epoch_seconds: of a whole epoch with one update at its end, from the medians of its parts: steps
    inside of the window (all for "exact"), one opening, steps outside, one update.
    """
    batch, total = random_batch(config), (updates + 1) * update_every
    nets = {
        kind: build_sparse(
            dataclasses.replace(config, signal=kind, update_every=update_every), 0, total, 1
        )
        for kind in SIGNALS
    }
    times: dict[str, dict[str, list[float]]] = {k: {p: [] for p in _PARTS} for k in nets}
    for step in range(updates * update_every):
        for kind, net in nets.items():
            where, seconds = _timed_step(net, batch)
            if step >= min(3, update_every):  # the first steps fill caches and make lists
                times[kind][where].append(seconds)
    steps = epoch_steps(config)
    rows = [_row(kind, net, times[kind], steps) for kind, net in nets.items()]
    return {"rows": rows, "epoch_steps": steps, "update_every": update_every}


def _timed_step(net: Contender, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[str, float]:
    """Where the step lay, and its seconds less those of the mask update after it."""
    masks = net.masking
    assert masks is not None
    inside = _listens(net)
    before, start = len(masks.history), time.perf_counter()
    net.step(*batch)
    seconds = time.perf_counter() - start - sum(r.seconds for r in masks.history[before:])
    if inside or not _listens(net):
        return _INSIDE if inside else _OUTSIDE, seconds
    return _OPENING, seconds


def _listens(net: Contender) -> bool:
    assert net.masking is not None
    return any(signal.layer.probe is not None for signal in net.masking._signals)


def _row(kind: str, net: Contender, times: dict[str, list[float]], steps: int) -> dict[str, Any]:
    masks = net.masking
    assert masks is not None
    medians = {part: statistics.median(times[part]) if times[part] else None for part in _PARTS}
    update = statistics.median(record.seconds for record in masks.history)
    length = masks._signals[0].length()
    window = steps if length is None else min(length, steps)
    epoch: float | None = update
    opening = int(0 < window < steps)
    for part, count in zip(_PARTS, (steps - window - opening, opening, window), strict=True):
        each = medians[part]
        if count and each is None:
            epoch = None  # such steps did not occur: update_every is shorter than the window
        elif count and epoch is not None and each is not None:
            epoch += count * each
    return {"signal": kind, "window": window, **medians, "update": update,
            "bytes": net.signal_peak, "epoch_seconds": epoch}  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """The rows as Markdown, with the machine below."""
    lines: list[Sequence[str]] = [
        ["signal", "steps of its window in an epoch", "step outside", "opening", "step inside",
         "update", "most bytes held", f"epoch of {found['epoch_steps']} steps"],
        ["---"] * 8,
    ]  # fmt: skip
    for row in found["rows"]:
        shown = [_ms(row[key]) for key in (*_PARTS, "update")]
        whole = row["epoch_seconds"]
        lines.append([row["signal"], str(row["window"]), *shown, f"{row['bytes']:,}",
                      "-" if whole is None else f"{whole:.2f} s"])  # fmt: skip
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    note = "Medians; an epoch is worked out from them. " + machine.one_line(found["machine"])
    return f"{text}\n\n`{found['command']}`\n\n{note}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.2f} ms"
