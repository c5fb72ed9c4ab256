"""Train the sparse net, and the dense one beside it, from one seed and in turns of one epoch.

The turns matter: both contenders meet the same hours of a shared machine. Times are training only,
evaluation is left out; ``step_seconds`` covers forward, backward, optimizer and masks, ``seconds``
also the making of batches.
"""

from __future__ import annotations

import csv
import math
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..training import checkpoint_files
from . import account, machine
from . import ranks as job
from .config import TrainConfig
from .contenders import Contender, build_dense, build_sparse, choose_dense, forget_compiled
from .datasets import BatchLoader, Dataset, hold_out, load
from .errors import TrainingError, WorkbenchError
from .models import spec
from .progress import TrainingProgress
from .session import Run, Session
from .stopping import StopRequested, StopSignals
from .tensorboard_log import require_tensorboard, write_tensorboard

_EVALUATION_BATCH = 500


def train(
    config: TrainConfig, folder: Path, resume: bool = False, ranks: job.Ranks | None = None
) -> dict[str, Any]:
    """Run the experiment, write a CSV log per contender and seed to ``folder``, return all results.

    ``resume`` goes on with the newest good checkpoint, if there is one (session.py). The result is
    plain data (see report.py). Raises WorkbenchError for settings that cannot be, DataError for
    data that is not there, TrainingError when a loss, gradient or weight stops being a number,
    TrainingStopped, with a checkpoint, after Ctrl-C or SIGTERM.
    """
    ranks = ranks or job.Ranks()
    config.check()
    checkpoint_files.require_safetensors()
    if config.tensorboard:
        require_tensorboard()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    _prepare_device(config, ranks)
    dataset = load(config.data, config.data_dir, download=config.download)
    if dataset.kind != spec(config.net).kind:
        raise WorkbenchError(
            f"--net {config.net} takes {spec(config.net).kind} images, --data {config.data} has "
            f"{dataset.kind}'s; choose a matching pair"
        )
    # Now: a commit made while it trains is not the code that does.
    header = machine.header() | machine.device_header(config.device)
    print(
        f"{config.net} on {config.data} ({dataset.source}); {machine.one_line(header)}", flush=True
    )
    with StopSignals() as stop:
        session = Session(config, folder, stop, ranks)
        if not (resume and session.resume()):
            ranks.on_rank_0(session.start_afresh)
            session.baseline = _baseline(config, dataset, ranks)
        done = {result["seed"] for result in session.finished}
        for seed in config.seeds:
            if seed not in done:
                _train_seed(session, dataset, seed)
    return {
        "config": config.as_dict(),
        "command": config.command(),
        "machine": header,
        "dense_baseline": session.baseline,
        "runs": session.finished,
    }


def _prepare_device(config: TrainConfig, ranks: job.Ranks) -> None:
    """Let cuDNN race its kernels. Raises WorkbenchError for --device cuda where it cannot be."""
    if config.device != "cuda":
        return
    if not torch.cuda.is_available():
        raise WorkbenchError(
            f"--device cuda: torch {torch.__version__} sees no CUDA device here; "
            "`sparse-kernels info` says what there is, --device cpu trains without"
        )
    if ranks.world > 1:
        raise WorkbenchError(
            f"--device cuda in a job of {ranks.world} processes: expected one process; `train` "
            "shares batches among CPUs only, a loop of your own (docs/training.md) among GPUs too"
        )
    if config.block == "auto":
        raise WorkbenchError(
            "--device cuda with --block auto: expected a block such as 1x1, 4x1 or 16x16; auto "
            "goes by the device that a model is made on, here the CPU"
        )
    torch.backends.cudnn.benchmark = True


def _baseline(config: TrainConfig, dataset: Dataset, ranks: job.Ranks) -> dict[str, Any] | None:
    """Choose the dense layout by measurement on this very net; None when nothing is compared.

    On several ranks a dense net is not compiled.
    """
    if config.compare is None:
        return None
    if ranks.world > 1:
        if config.dense_baseline.startswith("compile"):
            raise WorkbenchError(
                f"--dense-baseline {config.dense_baseline} in a job of {ranks.world} processes: "
                "expected contiguous or channels_last, a compiled net is not wrapped"
            )
        if config.dense_baseline == "auto":
            config = replace(config, dense_baseline="contiguous")
    return ranks.on_rank_0(lambda: _measured_baseline(config, dataset))


def _measured_baseline(config: TrainConfig, dataset: Dataset) -> dict[str, Any]:
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


def _train_seed(session: Session, dataset: Dataset, seed: int) -> None:
    """Train the contenders of one seed, from the start or from the session's checkpoint."""
    config, ranks = session.config, session.ranks
    train_split, validation = hold_out(dataset.train, config.holdout, seed)
    if len(train_split) < 2:
        raise WorkbenchError(f"--holdout {config.holdout}: nothing is left to train on; lower it")
    ranks.check_batches(len(train_split), config.batch_size)
    batches = len(BatchLoader(train_split, dataset, config.batch_size, seed=seed))
    total = min(batches * config.epochs, config.max_steps or batches * config.epochs)
    contenders = _build(session, seed, batches)
    shape = spec(config.net).input_shape
    session.runs = [
        Run(
            contender,
            seed,
            BatchLoader(train_split, dataset, config.batch_size, seed=seed, augment=config.augment),
            BatchLoader(validation, dataset, _EVALUATION_BATCH) if len(validation) else None,
            BatchLoader(dataset.test, dataset, _EVALUATION_BATCH),
            account.output_positions(contender.model, shape),
            # Logs are rank 0's.
            session.folder / f"log-{contender.name}-seed{seed}.csv"
            if ranks.rank == 0
            else Path(os.devnull),
            {cost.name: cost.density for cost in account.layer_costs(contender.model, {})},
        )
        for contender in contenders
    ]
    for run in session.runs:
        if run.contender.compiled or config.device == "cuda":  # there kernels load, and compile
            warm_up(run.contender, run.train)
    _place(session, seed)
    try:
        _train_epochs(session, total, math.ceil(total / batches))
        session.finished += [_result(run) for run in session.runs]
        session.save()
    except TrainingError as error:
        raise session.explain_failure(error) from error


def _build(session: Session, seed: int, batches: int) -> list[Contender]:
    """The contenders of one seed, the sparse one first, whose epochs have `batches` steps."""
    config, ranks = session.config, session.ranks
    known = session.known_costs(seed)
    built = [build_sparse(config, seed, batches * config.epochs, batches, ranks, known)]
    if seed == config.seeds[0]:
        print(built[0].report, flush=True)
    if session.baseline is not None:
        forget_compiled()
        built.append(build_dense(config, seed, session.baseline["chosen"], ranks))
    return built


def _place(session: Session, seed: int) -> None:
    """Set the session to the first step of `seed`, or to where the checkpoint of it was taken."""
    if session.seed == seed:
        session.restore_runs()
        for run in session.runs:
            _write_csv(run.log, run.epochs)  # it may hold rows from after the checkpoint
    else:
        session.seed, session.epoch, session.turn = seed, 1, 0


def _train_epochs(session: Session, total: int, last_epoch: int) -> None:
    """Epoch by epoch, each contender in turn, from where the session stands."""
    done = {run.contender.name: run.contender.steps_done for run in session.runs}
    with TrainingProgress(dict.fromkeys(done, total), done) as progress:
        while session.epoch <= last_epoch:
            while session.turn < len(session.runs):
                run = session.runs[session.turn]
                _train_epoch(session, run, total, progress)
                _evaluate_epoch(session, run, last=run.contender.steps_done >= total)
                progress.line(_epoch_line(run))
                session.turn += 1
            session.epoch, session.turn = session.epoch + 1, 0


def warm_up(contender: Contender, train: BatchLoader) -> None:
    """A contender's first passes, outside the measured time: compiled, for both batch sizes.

    The net stays as the seed made it.
    """
    buffers = [(buffer, buffer.clone()) for buffer in contender.model.buffers()]
    images = torch.zeros(train.batch_size, *train.split.images.shape[1:])
    full, left = min(train.batch_size, len(train.split)), len(train.split) % train.batch_size
    for size in {full, left if contender.compiled else full} - {0, 1}:
        contender.forward(contender.arrange(images[:size])).sum().backward()
    for buffer, before in buffers:
        if not torch.equal(buffer, before):  # a norm's; indices are not touched
            buffer.copy_(before)
    contender.optimizer.zero_grad(set_to_none=True)
    contender.wait()


def _train_epoch(session: Session, run: Run, total: int, progress: TrainingProgress) -> None:
    """One pass over the training data, or what is left of it or of ``total`` steps."""
    contender, length = run.contender, len(run.train)
    if not run.in_epoch:
        run.losses, run.elapsed, run.in_epoch = [], 0.0, True
    if contender.steps_done >= total:
        return
    start = time.perf_counter()
    for images, labels in run.train:
        begin, looked = time.perf_counter(), 0.0

        last, final = run.train.position == length, contender.steps_done + 1 >= total

        def look(final: bool = final) -> None:
            """The net as it was trained, before a mask update exchanges many of its weights."""
            nonlocal looked
            began = time.perf_counter()
            run.looked["watched"] = _accuracy(session, run, run.watched, whole=True)
            if final and run.validation is not None:
                run.looked["test"] = _accuracy(session, run, run.test, whole=True)
            looked = time.perf_counter() - began

        loss = contender.step(images, labels, look if last or final else None)
        now = time.perf_counter() - looked
        run.step_times.append(now - begin)
        run.losses.append(loss)
        run.saved_memory = None
        run.elapsed += now - start
        progress.advance(contender.name, loss)
        session.after_step(run, last)
        if contender.steps_done >= total:
            break
        start = time.perf_counter()  # a checkpoint is no part of the training's time


def _evaluate_epoch(session: Session, run: Run, last: bool) -> None:
    """Make the epoch's record and append it to the CSV log.

    With held-out data the test set is looked at once, at the end; without, after every epoch. Where
    the epoch ended with a mask update, the accuracy is of the net before it, as in the official
    code: what the update takes and grows is not trained yet.
    """
    contender, times = run.contender, run.step_times[-len(run.losses) :]
    costs = account.layer_costs(contender.model, run.positions)
    record: dict[str, Any] = {
        "epoch": session.epoch,
        "step": contender.steps_done,
        "train_loss": statistics.fmean(run.losses),
        "epoch_seconds": run.elapsed,
        "seconds": run.seconds + run.elapsed,
        "step_seconds": statistics.median(times),
        "mean_step_seconds": statistics.fmean(times),
        "lr": contender.optimizer.param_groups[0]["lr"],
        "prune_rate": (
            float(contender.masking.prune_rate) if contender.masking is not None else None
        ),
    }
    watched = run.looked.get("watched")
    if watched is None:
        watched = _accuracy(session, run, run.watched)
    if run.validation is None:
        record |= {"validation_accuracy": None, "test_accuracy": watched}
    else:
        record |= {"validation_accuracy": watched, "test_accuracy": run.looked.get("test")}
        if last and record["test_accuracy"] is None:
            record["test_accuracy"] = _accuracy(session, run, run.test)
    record["density"] = account.weight_density(costs)
    record["flops_density"] = account.flops_density(costs)
    record["executed_flops_density"] = account.executed_flops_density(costs)
    record["layers"] = {cost.name: cost.density for cost in costs}
    run.seconds += run.elapsed
    run.epochs.append(record)
    run.in_epoch, run.looked = False, {}
    _write_csv(run.log, run.epochs)
    if session.config.tensorboard:
        write_tensorboard(run.log, run.epochs)


def _accuracy(session: Session, run: Run, batches: BatchLoader, whole: bool = False) -> float:
    """The accuracy, unless a signal comes: it stops here, and the evaluation is made again.

    whole: a signal waits, for within a step there is nothing to save.
    """
    if session.ranks.world > 1:  # a signal waits: all ranks stop after the same step
        return session.ranks.on_rank_0(lambda: run.contender.accuracy(batches))
    if whole:
        return run.contender.accuracy(batches)
    try:
        return run.contender.accuracy(session.stop.watch(batches))
    except StopRequested:
        run.contender.model.train()
        session.save()
        session.stopped()
        raise  # stopped() has raised


def _write_csv(path: Path, records: list[dict[str, Any]]) -> None:
    """A row per epoch."""
    rows = []
    for record in records:
        flat = {key: value for key, value in record.items() if key != "layers"}
        rows.append(flat | {f"density:{name}": value for name, value in record["layers"].items()})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys() if rows else [])
        if rows:
            writer.writeheader()
        writer.writerows(
            {key: "" if value is None else value for key, value in row.items()} for row in rows
        )


def _epoch_line(run: Run) -> str:
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


def _result(run: Run) -> dict[str, Any]:
    costs = account.layer_costs(run.contender.model, run.positions)
    memory = run.memory()
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
