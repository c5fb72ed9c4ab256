"""Checkpoints of a training: save_checkpoint, load_checkpoint, latest_checkpoint.

    load = latest_checkpoint("checkpoints") is not None
    start = load_checkpoint("checkpoints", model, optimizer, masks).step if load else 0
    for step in range(start, total):
        ...
        masks.step()
        if (step + 1) % 1000 == 0:
            save_checkpoint("checkpoints", step + 1, model, optimizer, masks)

Call them between two steps, after ``masks.step()``: gradients are not stored, so a checkpoint
between micro-batches would lose some.  Under DistributedDataParallel call both on every rank.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from sparse_kernels.nn._checkpoint import CheckpointError

from . import checkpoint_files, data_parallel, generators, training_state
from .checkpoint_files import CheckpointFiles, checkpoint_folders
from .process_group import Group
from .sparse_momentum import SparseMomentum

__all__ = ["Checkpoint", "CheckpointError", "latest_checkpoint", "load_checkpoint",
           "save_checkpoint"]  # fmt: skip

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Checkpoint:
    """What load_checkpoint found. rejected: newer ones that are broken, each with the reason."""

    path: Path
    step: int
    extra: Any = None
    versions: Mapping[str, str] = field(default_factory=dict)
    rejected: tuple[str, ...] = ()


def save_checkpoint(
    directory: str | os.PathLike[str],
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    masks: SparseMomentum | None = None,
    *,
    others: Mapping[str, Any] | None = None,
    extra: Any = None,
    keep: int = 3,
) -> Path:
    """Write a checkpoint to a new folder in `directory`; the newest `keep` stay, older ones go.

    Stored are: patterns, values, dense parameters and buffers (model.state_dict()), what `tune`
    chose, the optimizer's state, the masks' schedule, counters, signal and generator, and the state
    of the global generators of torch (CPU and CUDA), numpy and random.

    Args:
        step: optimizer steps done; for you to go on from.
        others: name -> object with state_dict() and load_state_dict(), such as a learning-rate
            scheduler, a GradScaler or the model of an average.
        extra: plain data and tensors of your own, such as the place in the data.

    Several ranks: where `model` is a DistributedDataParallel, or `masks` are given, call it on
    every rank.  Rank 0 writes; stored are also the generators of the other ranks and the average
    of the growth signals, with which every rank goes on.

    Memory: the tensors once more, as bytes.  Returns the new folder.  Raises TypeError naming an
    entry that is no plain data, ValueError for a bad step, keep or name, OSError if the disk does
    not take it; older checkpoints then stay.
    """
    job = data_parallel.job_of(model, masks)
    if masks is not None:
        masks.synchronize()

    def pack() -> dict[str, Any]:
        return training_state.pack(data_parallel.unwrapped(model), optimizer, masks)

    # What one rank cannot store (an update that was stopped half way), no rank may wait for.
    state = pack() if job is None else job.everywhere(pack)
    state |= generators.of_all_ranks(job)
    state["others"] = {name: item.state_dict() for name, item in (others or {}).items()}
    state["extra"] = extra
    if job is None:
        return checkpoint_files.write(directory, step, state, keep)
    return job.on_rank_0(lambda: checkpoint_files.write(directory, step, state, keep))


def load_checkpoint(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    masks: SparseMomentum | None = None,
    *,
    others: Mapping[str, Any] | None = None,
    global_generators: bool = True,
) -> Checkpoint:
    """Load a checkpoint, or the newest good one of a directory of them, and go on from it.

    Model, optimizer and masks must be built as they were; densities, patterns, capacities and
    storages come from the checkpoint.  All checksums, every pattern, shape and dtype are checked
    before anything is changed.  In a directory a broken checkpoint is passed over with a
    RuntimeWarning that names its fault.

    global_generators: whether to set torch's, numpy's and random's generators too; on several
    ranks (see save_checkpoint), which all read the same files, each rank its own.
    Raises CheckpointError: nothing there, broken, of a newer format, or not of this model.
    """
    job = data_parallel.job_of(model, masks)
    model = data_parallel.unwrapped(model)
    found, rejected = _everywhere(job, lambda: _open(Path(path)))
    for reason in rejected:
        warnings.warn(f"passed over a newer checkpoint: {reason}", RuntimeWarning, stacklevel=2)
    state = found.state
    rank, world = (0, 1) if job is None else (job.rank, job.world)
    try:
        if job is not None:
            _check_same(job.gathered(found.path.name))
        _everywhere(job, lambda: training_state.check(state, model, optimizer, masks))
        if global_generators:
            drawn = generators.of_rank(
                state.get("generators"), state.get("rank_generators"), rank, world
            )
            generators.check(drawn)
        _check_others(state.get("others"), others or {})
    except CheckpointError as error:
        raise CheckpointError(f"{found.path}: {error}") from error
    training_state.unpack(state, model, optimizer, masks)
    for name, item in (others or {}).items():
        item.load_state_dict(state["others"][name])
    if global_generators:
        generators.restore(drawn)
    return Checkpoint(found.path, found.step, state.get("extra"), found.versions, tuple(rejected))


def latest_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint in `directory` whose every byte is right; None if there is none.

    It reads them to know; load_checkpoint(directory) does both at once.
    """
    found, _ = newest_good(directory)
    return None if found is None else found.path


def newest_good(directory: str | os.PathLike[str]) -> tuple[CheckpointFiles | None, list[str]]:
    """The newest whole checkpoint, read, and why newer ones were passed over."""
    rejected: list[str] = []
    for folder in checkpoint_folders(directory):
        try:
            return checkpoint_files.read(folder), rejected
        except CheckpointError as error:
            rejected.append(str(error))
    return None, rejected


def _open(path: Path) -> tuple[CheckpointFiles, list[str]]:
    if (path / checkpoint_files.MANIFEST).exists() or not checkpoint_folders(path):
        return checkpoint_files.read(path), []
    found, rejected = newest_good(path)
    if found is None:
        raise CheckpointError(f"{path}: no good checkpoint among {len(rejected)}: "
                              f"{'; '.join(rejected)}")  # fmt: skip
    return found, rejected


def _everywhere(job: Group | None, action: Callable[[], _Result]) -> _Result:
    """A rank that raises before a collective would leave the others waiting in it."""
    return action() if job is None else job.everywhere(action, CheckpointError)


def _check_same(names: list[str]) -> None:
    """Every rank must have found the same one, on one file system or on equal copies."""
    for rank, name in enumerate(names):
        if name != names[0]:
            raise CheckpointError(
                f"rank {rank} found {name}, rank 0 found {names[0]}; give all ranks one directory "
                "on a file system that they share"
            )


def _check_others(held: Any, others: Mapping[str, Any]) -> None:
    missing = sorted(set(others) - set(held if isinstance(held, dict) else {}))
    if missing:
        raise CheckpointError(f"no state of {missing} in it, expected what was saved as `others`")
