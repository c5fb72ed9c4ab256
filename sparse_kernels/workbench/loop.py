"""Train the sparse net, and the dense one beside it, from one seed and in turns of one epoch.

The turns matter: both contenders meet the same hours of a shared machine. Times are training only,
evaluation is left out; ``step_seconds`` covers forward, backward, optimizer and masks, ``seconds``
also the making of batches.
"""

from __future__ import annotations

import csv
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import account, machine
from .config import TrainConfig
from .contenders import Contender, build_dense, build_sparse, choose_dense, forget_compiled
from .datasets import BatchLoader, Dataset, hold_out, load
from .errors import WorkbenchError
from .models import spec
from .progress import TrainingProgress

_EVALUATION_BATCH = 500


@dataclass
class _Run:
    """One contender with one seed: its batches and what was logged."""

    contender: Contender
    seed: int
    train: BatchLoader
    validation: BatchLoader | None
    test: BatchLoader
    positions: dict[str, int]
    log: Path
    initial_layers: dict[str, float]  # density of each layer before the first step
    epochs: list[dict[str, Any]] = field(default_factory=list)
    step_times: list[float] = field(default_factory=list)
    seconds: float = 0.0


def train(config: TrainConfig, folder: Path) -> dict[str, Any]:
    """Run the experiment, write a CSV log per contender and seed to ``folder``, return all results.

    The result is plain data (see report.py). Raises WorkbenchError for settings that cannot be,
    DataError for data that is not there, TrainingError when a loss stops being a number.
    """
    config.check()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    dataset = load(config.data, config.data_dir, download=config.download)
    if dataset.kind != spec(config.net).kind:
        raise WorkbenchError(
            f"--net {config.net} takes {spec(config.net).kind} images, --data {config.data} has "
            f"{dataset.kind}'s; choose a matching pair"
        )
    print(
        f"{config.net} on {config.data} ({dataset.source}); {machine.one_line(machine.header())}",
        flush=True,
    )
    baseline = _baseline(config, dataset)
    runs = []
    for seed in config.seeds:
        for run in _train_seed(config, dataset, seed, folder, baseline):
            runs.append(_result(run))
    return {
        "config": config.as_dict(),
        "command": config.command(),
        "machine": machine.header(),
        "dense_baseline": baseline,
        "runs": runs,
    }


def _baseline(config: TrainConfig, dataset: Dataset) -> dict[str, Any] | None:
    """Choose the dense layout by measurement on this very net; None when nothing is compared."""
    if config.compare is None:
        return None
    batches = BatchLoader(dataset.train, dataset, min(config.batch_size, len(dataset.train)))
    chosen, timings, rejected = choose_dense(config, next(iter(batches)))
    shown = ", ".join(f"{name} {t.median * 1e3:.2f} ms" for name, t in timings.items())
    print(f"dense baseline: {chosen} (a step: {shown})", flush=True)
    for name, reason in rejected.items():
        print(f"dense baseline: {name} does not run here ({reason})", flush=True)
    return {
        "chosen": chosen,
        "timings": {name: timing.as_dict() for name, timing in timings.items()},
        "rejected": rejected,
    }


def _train_seed(
    config: TrainConfig, dataset: Dataset, seed: int, folder: Path, baseline: dict[str, Any] | None
) -> list[_Run]:
    train_split, validation = hold_out(dataset.train, config.holdout, seed)
    if len(train_split) < 2:
        raise WorkbenchError(f"--holdout {config.holdout}: nothing is left to train on; lower it")
    batches = len(BatchLoader(train_split, dataset, config.batch_size, seed=seed))
    total = min(batches * config.epochs, config.max_steps or batches * config.epochs)
    contenders = [build_sparse(config, seed, batches * config.epochs, batches)]
    if seed == config.seeds[0]:
        print(contenders[0].report, flush=True)
    if baseline is not None:
        forget_compiled()
        contenders.append(build_dense(config, seed, baseline["chosen"]))
    shape = spec(config.net).input_shape
    runs = [
        _Run(
            contender,
            seed,
            BatchLoader(train_split, dataset, config.batch_size, seed=seed, augment=config.augment),
            BatchLoader(validation, dataset, _EVALUATION_BATCH) if len(validation) else None,
            BatchLoader(dataset.test, dataset, _EVALUATION_BATCH),
            account.output_positions(contender.model, shape),
            folder / f"log-{contender.name}-seed{seed}.csv",
            {cost.name: cost.density for cost in account.layer_costs(contender.model, {})},
        )
        for contender in contenders
    ]
    for run in runs:
        if run.contender.compiled:
            warm_up(run.contender, run.train)
    with TrainingProgress({run.contender.name: total for run in runs}) as progress:
        for epoch in range(1, math.ceil(total / batches) + 1):
            for run in runs:
                _train_epoch(run, total, progress)
                _evaluate_epoch(run, epoch, last=run.contender.steps_done >= total)
                progress.line(_epoch_line(run))
    return runs


def warm_up(contender: Contender, train: BatchLoader) -> None:
    """A dense contender's first passes, outside the measured time: compiled, for both batch sizes.

    The net stays as the seed made it.
    """
    state = {name: tensor.clone() for name, tensor in contender.model.state_dict().items()}
    images = torch.zeros(train.batch_size, *train.split.images.shape[1:])
    full, left = min(train.batch_size, len(train.split)), len(train.split) % train.batch_size
    for size in {full, left if contender.compiled else full} - {0, 1}:
        contender.forward(contender.arrange(images[:size])).sum().backward()
    contender.model.load_state_dict(state)
    contender.optimizer.zero_grad(set_to_none=True)


def _train_epoch(run: _Run, total: int, progress: TrainingProgress) -> None:
    """One pass over the training data, or what is left of ``total`` steps."""
    contender, losses, times = run.contender, [], []
    start = time.perf_counter()
    for images, labels in run.train:
        begin = time.perf_counter()
        loss = contender.step(images, labels)
        times.append(time.perf_counter() - begin)
        losses.append(loss)
        progress.advance(contender.name, loss)
        if contender.steps_done >= total:
            break
    elapsed = time.perf_counter() - start
    run.seconds += elapsed
    run.step_times += times
    run.epochs.append(
        {
            "step": contender.steps_done,
            "train_loss": statistics.fmean(losses),
            "epoch_seconds": elapsed,
            "seconds": run.seconds,
            "step_seconds": statistics.median(times),
            "mean_step_seconds": statistics.fmean(times),
        }
    )


def _evaluate_epoch(run: _Run, epoch: int, last: bool) -> None:
    """Complete the epoch's record and append it to the CSV log.

    With held-out data the test set is looked at once, at the end; without, after every epoch.
    """
    contender = run.contender
    costs = account.layer_costs(contender.model, run.positions)
    record: dict[str, Any] = {"epoch": epoch, **run.epochs[-1]}
    record["lr"] = contender.optimizer.param_groups[0]["lr"]
    record["prune_rate"] = (
        float(contender.masking.prune_rate) if contender.masking is not None else None
    )
    record["validation_accuracy"] = contender.accuracy(run.validation) if run.validation else None
    look = last or run.validation is None
    record["test_accuracy"] = contender.accuracy(run.test) if look else None
    record["density"] = account.weight_density(costs)
    record["flops_density"] = account.flops_density(costs)
    record["executed_flops_density"] = account.executed_flops_density(costs)
    record["layers"] = {cost.name: cost.density for cost in costs}
    run.epochs[-1] = record
    _append_csv(run.log, record)


def _append_csv(path: Path, record: dict[str, Any]) -> None:
    flat = {key: value for key, value in record.items() if key != "layers"}
    flat |= {f"density:{name}": value for name, value in record["layers"].items()}
    first = record["epoch"] == 1
    with path.open("w" if first else "a", newline="") as file:
        writer = csv.DictWriter(file, flat.keys())
        if first:
            writer.writeheader()
        writer.writerow({key: "" if value is None else value for key, value in flat.items()})


def _epoch_line(run: _Run) -> str:
    record = run.epochs[-1]
    shown = [
        f"{name} {100 * record[key]:.2f} %"
        for key, name in (("validation_accuracy", "validation"), ("test_accuracy", "test"))
        if record[key] is not None
    ]
    return (
        f"seed {run.seed}  {run.contender.name:<6}  epoch {record['epoch']:>3}  "
        f"loss {record['train_loss']:.4f}  {'  '.join(shown)}  "
        f"{record['epoch_seconds']:.1f} s  ({record['mean_step_seconds'] * 1e3:.2f} ms a step)  "
        f"density {100 * record['density']:.2f} %"
    )


def _result(run: _Run) -> dict[str, Any]:
    costs = account.layer_costs(run.contender.model, run.positions)
    memory = account.memory(run.contender.model, run.contender.optimizer)
    signal = run.contender.signal_peak
    return {
        "seed": run.seed,
        "contender": run.contender.name,
        "layout": run.contender.layout,
        "test_accuracy": run.epochs[-1]["test_accuracy"],
        "steps": run.contender.steps_done,
        "seconds": run.seconds,
        "step_seconds": statistics.median(run.step_times),
        "mean_step_seconds": statistics.fmean(run.step_times),
        "epoch_seconds": statistics.median(record["epoch_seconds"] for record in run.epochs),
        "density": account.weight_density(costs),
        "flops_density": account.flops_density(costs),
        "executed_flops_density": account.executed_flops_density(costs),
        "memory": {**memory, "signal": signal, "total_with_signal": memory["total"] + signal},
        "initial_layers": run.initial_layers,
        "layers": [{"name": c.name, "shape": list(c.shape), "nnz": c.nnz} for c in costs],
        "epochs": run.epochs,
    }
