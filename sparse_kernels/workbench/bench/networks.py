"""Whole training steps, sparse against dense: time by part, memory, mask updates, patterns."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ... import layout
from ...training import window_length
from .. import account, machine
from ..config import TrainConfig
from ..contenders import Contender, build_sparse, drive, start_dense
from ..errors import WorkbenchError
from ..timing import Timing, interleave, summarize
from . import nets
from .contest import best_dense
from .results import Journal

_PROFILED_STEPS = 3
SIGNAL = "sparse, signal"
UPDATE_EVERY = 4  # of SIGNAL: shorter than the window of every common momentum
PARTS = (
    ("convolutions", ("conv",)),
    ("linear", ("linear", "addmm", "aten::mm")),
    ("norm", ("batch_norm", "norm")),
    ("pooling", ("pool",)),
    ("optimizer", ("sgd", "optimizer")),
)
REST = "other operators"
BETWEEN = "Python between"
PART_NAMES = (*(name for name, _ in PARTS), REST, BETWEEN)


def run(
    config: TrainConfig, *, steps: int, seconds: float, memory: bool, journal: Journal
) -> dict[str, Any]:
    """Time up to ``steps`` steps of each contender in turns on random images; plain data.

    Contenders: ``sparse`` (a usual step), ``sparse, signal`` (a step inside the window in which the
    growth signal gathers dense gradients) and the dense layouts. Of ``config`` only net, sparsity,
    batch, threads and dense baseline matter. Raises WorkbenchError for settings that cannot be, or
    a sparse net that does not compute what the masked dense net does.
    """
    config.check()
    # Each contender has its own distance to the mask update; the settings must not override it.
    config = dataclasses.replace(config, update_every=None)
    measured = journal.row("steps", lambda: _measure(config, steps, seconds))
    peaks = {}
    if memory:
        for name in ("sparse", SIGNAL, _eager_dense(measured["timings"])):
            made = journal.row(f"peak of {name}", partial(_peak_row, config, name))
            peaks[name] = made["bytes"]
    return {**measured, "peak_memory": peaks}


def _measure(config: TrainConfig, steps: int, seconds: float) -> dict[str, Any]:
    batch = nets.random_batch(config)
    # A long way to the first update: "sparse" never enters the window while it is timed.
    contenders = {
        "sparse": build_sparse(config, nets.SEED, 100 * nets.FAR, nets.FAR),
        SIGNAL: build_sparse(config, nets.SEED, 100 * nets.epoch_steps(config), UPDATE_EVERY),
    }
    nets.check_density(contenders["sparse"])
    errors = nets.check_net(contenders["sparse"].model, batch)
    print(f"{config.net}: sparse agrees with masked dense; starting the dense layouts", flush=True)
    dense, rejected = start_dense(config, batch)
    contenders |= dense
    print(f"timing {', '.join(contenders)} in turns", flush=True)
    calls = {name: step_call(contender, batch) for name, contender in contenders.items()}
    timings = interleave(calls, rounds=steps, warmup=2, budget=seconds)
    layout.reset_conversions()
    calls["sparse"]()
    conversions = layout.conversions()
    # Not a compiled net: its operators are fused, and their names say nothing about parts.
    split = [name for name in timings if not name.startswith("compile")]
    return {
        "timings": {name: timing.as_dict() for name, timing in timings.items()},
        "rejected": rejected,
        "errors": errors,
        "conversions_per_step": conversions,
        "parts": {name: _parts(calls[name], timings[name].median) for name in split},
        "memory": {name: _memory(contenders[name]) for name in timings},
        "densities": nets.densities(contenders["sparse"].model, config.net),
        "update": _update_cost(config, contenders[SIGNAL], timings),
    }


def step_call(contender: Contender, batch: tuple[Tensor, Tensor]) -> Callable[[], object]:
    """A step of the contender without arguments, its images as its loader would give them."""
    images, labels = batch
    images = contender.arrange(images)  # dense layouts in their own, sparse plain
    return lambda: contender.step(images, labels)


def _eager_dense(timings: dict[str, Any]) -> str:
    """The fastest layout that is not compiled: Inductor's own memory trains nothing."""
    eager = {n: t for n, t in timings.items() if not n.startswith(("compile", "sparse"))}
    return best_dense(eager) if eager else "contiguous"


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
    update, steps = summarize(seconds).median, nets.epoch_steps(config)
    window = min(steps, window_length(config.momentum, masking.config.window_tolerance))
    usual, inside = timings["sparse"].median, timings[SIGNAL].median
    epoch = (steps - window) * usual + window * inside + update
    dense = steps * timings[best_dense(timings)].median
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
    """Seconds of a step by part: operators' self time by torch's profiler, scaled to the step.

    What no operator accounts for is Python, autograd and the dispatcher between them.
    """
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        for _ in range(_PROFILED_STEPS):
            call()
        wall = time.perf_counter() - start
    sums = dict.fromkeys(PART_NAMES, 0.0)
    for event in profiler.key_averages():
        name = event.key.lower()
        part = next((p for p, words in PARTS if any(word in name for word in words)), REST)
        sums[part] += event.self_cpu_time_total * 1e-6
    # The profiler's own time makes a step longer; operators of two threads could overlap.
    sums[BETWEEN] = max(0.0, wall - sum(sums.values()))
    total = sum(sums.values())
    return {part: step_seconds * value / total for part, value in sums.items()}


def _peak_row(config: TrainConfig, contender: str) -> dict[str, Any]:
    return {"bytes": _peak(config, contender)}


def _peak(config: TrainConfig, contender: str) -> int:
    """Bytes by which a fresh process grows at most over building a net and a few steps."""
    request = json.dumps(
        {**config.as_dict(), "threads": torch.get_num_threads(), "contender": contender}
    )
    command = [sys.executable, "-m", "sparse_kernels.workbench.bench.peak_memory"]
    # `-m` looks into the working directory first: the very package that asks, not a checkout.
    here = Path(__file__).parents[3]
    done = subprocess.run(command, input=request, capture_output=True, text=True, cwd=here)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise WorkbenchError(f"peak memory of {contender} could not be measured: {lines[-1]}")
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    ours = machine.header()["isa"]
    if answer["isa"] != ours:
        raise WorkbenchError(
            f"peak memory of {contender}: expected a process with {ours} kernels as in this one, "
            f"it ran {answer['isa']}; set SPARSE_KERNELS_ISA for the whole command"
        )
    return int(answer["bytes"])


def run_patterns(
    config: TrainConfig,
    *,
    updates: tuple[int, ...],
    every: int,
    steps: int,
    seconds: float,
    journal: Journal,
) -> dict[str, Any]:
    """Usual steps on the pattern at the start (0) and after so many real mask updates, by dense.

    Between two of them the net trains on the loader's batches with an update after every ``every``
    steps (the growth signal is then the momentum of those steps). One row per entry of ``updates``,
    with density by layer; the lowest speedup counts. An interrupted run starts over.
    """
    config.check()
    config = dataclasses.replace(config, update_every=None)
    if len(journal.rows) >= len(updates):
        rows = [journal.rows[f"after {count} updates"] for count in updates]
    else:
        rows = _race_patterns(config, updates, every, steps, seconds, journal)
    return {"rows": rows, "speedup": min(row["speedup"] for row in rows)}


def _race_patterns(
    config: TrainConfig,
    updates: tuple[int, ...],
    every: int,
    steps: int,
    seconds: float,
    journal: Journal,
) -> list[dict[str, Any]]:
    data = nets.dataset_of(config)
    batches = nets.endless(nets.loader_of(data, config))
    sparse = build_sparse(config, nets.SEED, 100 * nets.FAR, nets.FAR)
    nets.check_density(sparse)
    start = nets.stored_blocks(sparse.model)
    batch = next(batches)
    dense, rejected = start_dense(config, batch)
    rows, done = [], 0
    for count in updates:
        if count > done:
            drive(sparse, nets.SEED + count, 10_000 * every, every)
            for _ in range((count - done) * every):
                sparse.step(*next(batches))
            drive(sparse, nets.SEED, 100 * nets.FAR, nets.FAR)
            done = count
        nets.check_counts(sparse, start)
        errors = nets.check_net(sparse.model, batch)
        race = {"sparse": sparse, **dense}
        calls = {name: step_call(contender, batch) for name, contender in race.items()}
        timings = interleave(calls, rounds=steps, warmup=2, budget=seconds)
        best = best_dense(timings)
        row = {
            "updates": count,
            "timings": {name: timing.as_dict() for name, timing in timings.items()},
            "dense_best": best,
            "speedup": timings[best].median / timings["sparse"].median,
            "rejected": rejected,
            "errors": errors,
            "data": data.source,
            "densities": nets.densities(sparse.model, config.net),
        }
        print(f"after {count} updates: {row['speedup']:.2f}x", flush=True)
        journal.add(f"after {count} updates", row)
        rows.append(row)
    return rows
