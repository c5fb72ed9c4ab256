"""One whole epoch, from the data loader's batch to updated weights, sparse and dense in turns.

The clock covers making the batch, layout conversion, forward, backward, optimizer, the growth
signal's window and the mask update at the end; augmentation is off for both. The contenders
alternate in blocks of steps, so that a drift of the machine meets both. The window before the
update is one block of its own, and so an interrupted epoch goes on at the last block boundary.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ...training import window_length
from ..config import TrainConfig
from ..contenders import Contender, build_dense, build_sparse, choose_dense
from ..datasets import BatchLoader, Dataset
from ..fetch import write_atomically
from ..loop import warm_up
from ..timing import summarize
from . import nets
from .results import Journal

_BASELINE = "dense baseline"


def run(
    config: TrainConfig,
    *,
    block_steps: int,
    max_steps: int | None,
    journal: Journal,
    state: Path | None,
) -> dict[str, Any]:
    """Train one epoch (or ``max_steps`` steps) with a mask update at its end; plain data.

    ``state``: where weights and optimizer states are kept for an interrupted run to go on; None
    keeps nothing. Raises WorkbenchError where the sparse net is wrong or a layer's blocks change
    under --redistribution none.
    """
    config.check()
    config = dataclasses.replace(config, update_every=None, augment=False)
    wanted = None if max_steps is None else max_steps * config.batch_size
    data = nets.dataset_of(config, wanted)
    steps = len(nets.loader_of(data, config))
    window = min(steps, window_length(config.momentum, config.window_tolerance))
    baseline = journal.row(_BASELINE, lambda: _choose(config, data))
    plan = _blocks(steps, window, block_steps)
    done = _whole_blocks(journal, plan, state)
    first = plan[done][0] if done < len(plan) else steps
    race = _race(config, data, baseline, steps, first, state if done else None, journal)
    for start, stop in plan[done:]:
        _run_block(race, start, stop, journal)
        if state is not None:
            _save(race, state)
    final = journal.row("end", lambda: _finish(race["sparse"], config, journal.rows["start"]))
    return _summary(journal, plan, steps, window, baseline, final, data.source)


@dataclasses.dataclass
class _Runner:
    contender: Contender
    batches: Iterator[tuple[Tensor, Tensor]]


def _choose(config: TrainConfig, data: Dataset) -> dict[str, Any]:
    chosen, timings, rejected = choose_dense(config, next(iter(nets.loader_of(data, config))))
    shown = ", ".join(f"{name} {1e3 * t.median:.1f} ms" for name, t in timings.items())
    print(f"dense baseline: {chosen} (a step: {shown})", flush=True)
    return {
        "chosen": chosen,
        "timings": {name: timing.as_dict() for name, timing in timings.items()},
        "rejected": rejected,
    }


def _blocks(steps: int, window: int, block_steps: int) -> list[tuple[int, int]]:
    """[start, stop) of the blocks; the last is the window with the update after it."""
    usual = steps - window
    cuts = [*range(0, usual, block_steps), usual] if usual else [0]
    return [*pairwise(cuts), (usual, steps)]


def _key(start: int) -> str:
    return f"block from step {start}"


def _whole_blocks(journal: Journal, plan: list[tuple[int, int]], state: Path | None) -> int:
    """How many blocks are done; none if the weights of that moment are not there."""
    done = 0
    while done < len(plan) and _key(plan[done][0]) in journal.rows:
        done += 1
    if done and done < len(plan) and (state is None or not state.is_file()):
        for start, _ in plan:
            journal.rows.pop(_key(start), None)
        return 0
    return done


def _race(
    config: TrainConfig,
    data: Dataset,
    baseline: dict[str, Any],
    steps: int,
    first: int,
    state: Path | None,
    journal: Journal,
) -> dict[str, _Runner]:
    """Both contenders at step ``first``: checked, warmed up, their loaders advanced."""
    left = max(1, steps - first)
    # Many epochs to come: the prune rate of this one is that of a training's beginning.
    sparse = build_sparse(config, nets.SEED, 100 * left, left)
    dense = build_dense(config, nets.SEED, baseline["chosen"])
    loaders = {name: nets.loader_of(data, config) for name in ("sparse", "dense")}
    if state is None and first == 0:
        nets.check_density(sparse)
        batch = next(iter(nets.loader_of(data, config)))
        errors = partial(nets.check_net, sparse.model, batch)
        journal.row("start", lambda: {"blocks": nets.stored_blocks(sparse.model),
                                      "errors": errors()})  # fmt: skip
    if first < steps:
        warm_up(dense, loaders["dense"])
        _warm_up_sparse(config, loaders["sparse"])
    if state is not None:
        saved = torch.load(state, weights_only=True)
        for name, contender in (("sparse", sparse), ("dense", dense)):
            contender.model.load_state_dict(saved[name]["model"])
            contender.optimizer.load_state_dict(saved[name]["optimizer"])
            contender.steps_done = first
    race = {}
    for name, contender in (("sparse", sparse), ("dense", dense)):
        batches = iter(loaders[name])
        for _ in range(first):
            next(batches)
        race[name] = _Runner(contender, batches)
    return race


def _warm_up_sparse(config: TrainConfig, loader: BatchLoader) -> None:
    """Allocator, threads and the plan's choices, on a net that is thrown away."""
    double = build_sparse(config, nets.SEED, 100 * nets.FAR, nets.FAR)
    shape = (loader.batch_size, *loader.split.images.shape[1:])
    for _ in range(2):
        double.step(torch.zeros(shape), torch.zeros(shape[0], dtype=torch.long))


def _run_block(race: dict[str, _Runner], start: int, stop: int, journal: Journal) -> None:
    """Steps ``start`` to ``stop`` of both; who begins alternates from block to block."""
    order = list(race) if len(journal.rows) % 2 else list(race)[::-1]
    row: dict[str, Any] = {"start": start, "stop": stop, "order": order}
    for name in order:
        runner = race[name]
        times = []
        begin = time.perf_counter()
        for _ in range(stop - start):
            tick = time.perf_counter()
            runner.contender.step(*next(runner.batches))
            times.append(time.perf_counter() - tick)
        row[name] = {"seconds": time.perf_counter() - begin, "steps": times}
    masking = race["sparse"].contender.masking
    assert masking is not None
    row["updates"] = [record.seconds for record in masking.history]
    journal.add(_key(start), row)
    print(
        f"steps {start + 1:>4} to {stop:>4}: sparse {row['sparse']['seconds']:8.2f} s, dense "
        f"{row['dense']['seconds']:8.2f} s, "
        f"{row['dense']['seconds'] / row['sparse']['seconds']:.2f}x",
        flush=True,
    )


def _save(race: dict[str, _Runner], path: Path) -> None:
    state = {
        name: {
            "model": runner.contender.model.state_dict(),
            "optimizer": runner.contender.optimizer.state_dict(),
        }
        for name, runner in race.items()
    }

    def fill(file: BinaryIO) -> None:
        torch.save(state, file)

    write_atomically(path, fill)


def _finish(runner: _Runner, config: TrainConfig, start: dict[str, Any]) -> dict[str, Any]:
    nets.check_counts(runner.contender, start["blocks"])
    return {"densities": nets.densities(runner.contender.model, config.net)}


def _summary(
    journal: Journal,
    plan: list[tuple[int, int]],
    steps: int,
    window: int,
    baseline: dict[str, Any],
    final: dict[str, Any],
    source: str,
) -> dict[str, Any]:
    rows = [journal.rows[_key(start)] for start, _ in plan]
    seconds = {name: sum(row[name]["seconds"] for row in rows) for name in ("sparse", "dense")}
    usual = rows[:-1]
    ratios = [row["dense"]["seconds"] / row["sparse"]["seconds"] for row in usual]
    return {
        "blocks": rows,
        "steps": steps,
        "window_steps": window,
        "seconds": seconds,
        "speedup": seconds["dense"] / seconds["sparse"],
        "usual_speedup": dataclasses.asdict(summarize(ratios)) if ratios else None,
        "window_speedup": rows[-1]["dense"]["seconds"] / rows[-1]["sparse"]["seconds"],
        "update_seconds": sum(rows[-1]["updates"]),
        "dense_baseline": baseline,
        "errors": journal.rows["start"]["errors"],
        "densities": final["densities"],
        "data": source,
        "resumed": journal.resumed > 0,
    }
