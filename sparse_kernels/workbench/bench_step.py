"""Whole training steps, sparse against dense: time by part, memory, mask updates."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .. import layout
from ..training import window_length
from . import account, machine, models
from .config import TrainConfig
from .contenders import Contender, build_sparse, start_dense
from .errors import WorkbenchError
from .steptime import Timing, interleave, summarize

_EPOCH_EXAMPLES = {"mnist": 54_000, "cifar10": 45_000}  # a tenth of the training set is held out
_PROFILED_STEPS = 3
SIGNAL = "sparse, signal"
UPDATE_EVERY = 4  # of SIGNAL: shorter than the window of every common momentum
_PARTS = (
    ("convolutions", ("conv",)),
    ("linear", ("linear", "addmm", "aten::mm")),
    ("norm", ("batch_norm",)),
)


def run(config: TrainConfig, *, steps: int, memory: bool = True) -> dict[str, Any]:
    """Time ``steps`` steps of each contender in turns on random images; plain data.

    Contenders: ``sparse`` (a usual step), ``sparse, signal`` (a step inside the window in which the
    growth signal gathers dense gradients) and the dense layouts. Of ``config`` only net, sparsity,
    batch, threads and dense baseline matter. Raises WorkbenchError for settings that cannot be.
    """
    config.check()
    # Each contender has its own distance to the mask update; the settings must not override it.
    config = dataclasses.replace(config, update_every=None)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    batch = random_batch(config)
    contenders, rejected = _contenders(config, batch)
    calls = {name: _call(contender, batch) for name, contender in contenders.items()}
    timings = interleave(calls, rounds=steps, warmup=2)
    layout.reset_conversions()
    calls["sparse"]()
    conversions = layout.conversions()
    # Not a compiled net: its operators are fused, and their names say nothing about parts.
    split = [name for name in timings if not name.startswith("compile")]
    return {
        "machine": machine.header(),
        "settings": {**config.as_dict(), "steps": steps},
        "timings": {name: timing.as_dict() for name, timing in timings.items()},
        "rejected": rejected,
        "conversions_per_step": conversions,
        "parts": {name: _parts(calls[name], timings[name].median) for name in split},
        "memory": {name: _memory(contenders[name]) for name in timings},
        "peak_memory": _peaks(config, timings) if memory else {},
        "update": _update_cost(config, contenders[SIGNAL], timings),
    }


def random_batch(config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Images float32 [batch, C, H, W] and labels int64 [batch], by a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    shape = (config.batch_size, *models.spec(config.net).input_shape)
    return torch.randn(shape, generator=generator), torch.randint(
        0, 10, (shape[0],), generator=generator
    )


def _epoch_steps(config: TrainConfig) -> int:
    return math.ceil(_EPOCH_EXAMPLES[models.spec(config.net).kind] / config.batch_size)


def _contenders(
    config: TrainConfig, batch: tuple[Tensor, Tensor]
) -> tuple[dict[str, Contender], dict[str, str]]:
    """All contenders after one step, and why a dense layout cannot take part."""
    epoch = _epoch_steps(config)
    # A long way to the first update: "sparse" never enters the window while it is timed.
    far, always = 1_000_000, UPDATE_EVERY
    contenders = {
        "sparse": build_sparse(config, 0, 100 * far, far),
        SIGNAL: build_sparse(config, 0, 100 * epoch, always),
    }
    dense, rejected = start_dense(config, batch)
    return {**contenders, **dense}, rejected


def _call(contender: Contender, batch: tuple[Tensor, Tensor]) -> Callable[[], object]:
    images, labels = batch
    # Each contender gets its images as its loader would: dense layouts in their own, sparse plain.
    images = contender.arrange(images)
    return lambda: contender.step(images, labels)


def _best_dense(timings: dict[str, Timing]) -> str:
    return min((n for n in timings if not n.startswith("sparse")), key=lambda n: timings[n].median)


def _memory(contender: Contender) -> dict[str, int]:
    """The account, and the growth signal at most so far in a total of its own."""
    held = account.memory(contender.model, contender.optimizer)
    signal = contender.signal_peak
    return {**held, "signal": signal, "total_with_signal": held["total"] + signal}


def _update_cost(
    config: TrainConfig, updating: Contender, timings: dict[str, Timing]
) -> dict[str, float]:
    """Seconds of a mask update, and what signal and update add to an epoch of usual steps."""
    masking = updating.masking
    assert masking is not None
    # The first update also allocates; it is not typical.
    seconds = [record.seconds for record in masking.history[1:]]
    if not seconds:
        return {}
    update, steps = summarize(seconds).median, _epoch_steps(config)
    window = min(steps, window_length(config.momentum, masking.config.window_tolerance))
    usual, inside = timings["sparse"].median, timings[SIGNAL].median
    epoch = (steps - window) * usual + window * inside + update
    dense = steps * timings[_best_dense(timings)].median
    return {
        "update_seconds": update,
        "updates_timed": len(seconds),
        "epoch_steps": steps,
        "window_steps": window,
        "epoch_seconds": epoch,
        "dense_epoch_seconds": dense,
        "update_share": update / epoch,
        "signal_share": window * (inside - usual) / epoch,
        "epoch_speedup": dense / epoch,
    }


def _parts(call: Callable[[], object], step_seconds: float) -> dict[str, float]:
    """Seconds of a step by part: shares of self time in torch's profiler times the step."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(_PROFILED_STEPS):
            call()
    sums = dict.fromkeys([name for name, _ in _PARTS] + ["rest"], 0.0)
    for event in profiler.key_averages():
        name = event.key.lower()
        part = next((p for p, words in _PARTS if any(word in name for word in words)), "rest")
        sums[part] += event.self_cpu_time_total
    total = sum(sums.values()) or 1.0
    return {part: step_seconds * value / total for part, value in sums.items()}


def _peaks(config: TrainConfig, timings: dict[str, Timing]) -> dict[str, int]:
    """Bytes by which a fresh process grows at most over building a net and a few steps.

    Dense is the fastest layout that is not compiled: Inductor's own memory trains nothing.
    """
    eager = {n: t for n, t in timings.items() if not n.startswith("compile")}
    dense = _best_dense(eager) if len(eager) > 2 else "contiguous"
    return {name: _peak(config, name) for name in ("sparse", SIGNAL, dense)}


def _peak(config: TrainConfig, contender: str) -> int:
    request = json.dumps(
        {**config.as_dict(), "threads": torch.get_num_threads(), "contender": contender}
    )
    command = [sys.executable, "-m", "sparse_kernels.workbench.peak_memory"]
    # `-m` looks into the working directory first: the very package that asks, not a checkout.
    here = Path(__file__).parents[2]
    done = subprocess.run(command, input=request, capture_output=True, text=True, cwd=here)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise WorkbenchError(f"peak memory of {contender} could not be measured: {lines[-1]}")
    return int(done.stdout.strip().splitlines()[-1])


def table(results: dict[str, Any]) -> str:
    """Markdown: time by part, memory, mask update."""
    settings, timings = results["settings"], results["timings"]
    best = min(
        (n for n in timings if not n.startswith("sparse")), key=lambda n: timings[n]["median"]
    )
    lines = [
        f"A training step of {settings['net']}, batch {settings['batch_size']}, density "
        f"{100 * settings['density']:g} %, block {settings['block']}, {settings['steps']} steps in "
        "turns. "
        f"{machine.one_line(results['machine'])}",
        "",
        "| contender | step, ms [quartiles] | dense / this | convolutions | linear | norm | rest |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, timing in timings.items():
        parts = results["parts"].get(name)
        split = (
            [f"{1e3 * parts[p]:.1f} ms" for p in ("convolutions", "linear", "norm", "rest")]
            if parts
            else [""] * 4
        )
        ms = [f"{1e3 * timing[key]:.1f}" for key in ("median", "low", "high")]
        ratio = timings[best]["median"] / timing["median"]
        lines.append(
            "| " + " | ".join([name, f"{ms[0]} [{ms[1]}, {ms[2]}]", f"{ratio:.2f}x", *split]) + " |"
        )
    for name, reason in results["rejected"].items():
        lines.append(f"| {name} | does not run here: {reason} | | | | | |")
    lines += [
        "",
        f"Conversions to feature-major per sparse step: {results['conversions_per_step']}.",
        "",
    ]
    return "\n".join([*lines, *_memory_table(results, best), "", *_update_lines(results["update"])])


def _memory_table(results: dict[str, Any], best: str) -> list[str]:
    lines = ["| MB | sparse | dense | dense / sparse |", "|---|---:|---:|---:|"]
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
    for part, ours, theirs in rows:
        ratio = f"{theirs / ours:.2f}x" if ours and theirs else ""
        lines.append(f"| {part} | {ours / 1e6:.2f} | {theirs / 1e6:.2f} | {ratio} |")
    return lines


def _update_lines(update: dict[str, float]) -> list[str]:
    if not update:
        return ["Mask update: not timed (too few steps)."]
    return [
        f"Mask update: {1e3 * update['update_seconds']:.1f} ms, "
        f"{100 * update['update_share']:.2f} % of an epoch of "
        f"{update['epoch_steps']} steps; gathering the growth signal in the last "
        f"{update['window_steps']} steps: {100 * update['signal_share']:.2f} %.",
        f"An epoch so computed: sparse {update['epoch_seconds']:.1f} s, "
        f"dense {update['dense_epoch_seconds']:.1f} s, "
        f"{update['epoch_speedup']:.2f}x.",
    ]
