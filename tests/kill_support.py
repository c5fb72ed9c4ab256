"""Runs of `sparse-kernels train` that are killed by SIGKILL at a named point or a random moment.

A killed run is a forked child of a process that has imported everything, so that a kill costs a
fraction of a second.  The points are patches of the child's own copy of the code: the package
itself has no hook for them.  Fork only from a process that has run nothing on several threads.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_kernels.nn import SparseLayer
from sparse_kernels.training import (
    apply_change,
    checkpoint_files,
    sparse_momentum,
    training_state,
)
from sparse_kernels.training.signals import LayerSignal
from sparse_kernels.workbench import contenders, datasets, loop, machine, models
from sparse_kernels.workbench.config import TrainConfig

SMALL = TrainConfig(
    data="mnist-sample", density=0.1, batch_size=100, epochs=2, update_every=4, signal="window",
    window_tolerance=0.6, max_steps=23, threads=1, checkpoint_every=2, holdout=0.8, keep=2,
)  # fmt: skip
EXPERIMENTS: dict[str, dict[str, Any]] = {
    "window": {},
    "exact, blocks": {"signal": "exact", "block": "4x1", "redistribution": "nonzero"},
    "random, augmented": {"signal": "random", "augment": True, "checkpoint_every": 1},
    "gradient, beside dense": {"signal": "gradient", "compare": "dense",
                               "dense_baseline": "contiguous", "max_steps": 14},
    "FLOPs budget": {"flops_budget": "start", "cost_weight": 0.5, "max_steps": 15},
    "two seeds": {"seeds": (3, 4), "max_steps": 11},
    "LeNet-5": {"net": "lenet-5-caffe", "batch_size": 50, "max_steps": 13},
}  # fmt: skip


def small_net(**options: Any) -> nn.Module:
    """Linear layers, batch norm and dropout, small enough for thousands of runs."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Dropout(0.3),
        nn.Linear(40, 30), nn.ReLU(), nn.Dropout(0.2), nn.Linear(30, 10),
    )  # fmt: skip


# ---- where a run dies --------------------------------------------------------------------------


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _patch(owner: Any, name: str, when: int, before: bool) -> None:
    """Die before or after the `when`-th call of owner.name."""
    whole, calls = getattr(owner, name), [0]

    def counted(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if before and calls[0] == when:
            die()
        result = whole(*arguments, **options)
        if calls[0] == when:
            die()
        return result

    setattr(owner, name, counted)


def _half_file(when: int) -> None:
    whole, calls = checkpoint_files._write_file, [0]

    def torn(path: Path, content: bytes) -> None:
        calls[0] += 1
        if calls[0] == when:
            path.write_bytes(content[: len(content) // 2])
            die()
        whole(path, content)

    checkpoint_files._write_file = torn


def _half_removed(when: int) -> None:
    whole, calls = shutil.rmtree, [0]

    def torn(path: Path, **options: Any) -> None:
        calls[0] += 1
        if calls[0] == when:
            next(Path(path).iterdir()).unlink()
            die()
        whole(path, **options)

    shutil.rmtree = torn  # type: ignore[assignment]


# name -> (largest number of the call at which it may strike, how it is set)
POINTS: dict[str, tuple[int, Callable[[int], None]]] = {
    "before a step": (20, lambda n: _patch(contenders.Contender, "step", n, True)),
    "after a step": (20, lambda n: _patch(contenders.Contender, "step", n, False)),
    "after backward": (20, lambda n: _patch(contenders.Contender, "_check_gradients", n, True)),
    "in the growth window": (12, lambda n: _patch(LayerSignal, "observe", n, False)),
    "before a mask update's plan": (3, lambda n: _patch(sparse_momentum, "plan_update", n, True)),
    "after a mask update's plan": (3, lambda n: _patch(sparse_momentum, "plan_update", n, False)),
    "between layers of a mask update": (8, lambda n: _patch(apply_change, "rewrite", n, False)),
    "inside the rewrite of a layer": (8, lambda n: _patch(SparseLayer, "set_pattern_", n, True)),
    "before a checkpoint": (8, lambda n: _patch(checkpoint_files, "write", n, True)),
    "in a checkpoint's file, half written": (40, _half_file),
    "before a file's sync": (40, lambda n: _patch(os, "fsync", n, True)),
    "before a rename": (12, lambda n: _patch(os, "rename", n, True)),
    "after a rename": (12, lambda n: _patch(os, "rename", n, False)),
    "in the removal of an old checkpoint": (6, _half_removed),
    "in an evaluation": (3, lambda n: _patch(contenders.Contender, "accuracy", n, True)),
    "before the log": (3, lambda n: _patch(loop, "_write_csv", n, True)),
    "while resuming": (2, lambda n: _patch(training_state, "unpack", n, False)),
}  # fmt: skip
RANDOM_TIME = "at a random moment"


# ---- children ----------------------------------------------------------------------------------


def prepare() -> None:
    """Once, in the parent: one thread, one data set for all children."""
    torch.set_num_threads(1)
    importlib.import_module("torch._dynamo")  # seconds, which each child would pay again
    loop.load = functools.lru_cache(datasets.load)  # type: ignore[assignment]
    loop.load(SMALL.data, None, download=False)
    machine.header = functools.lru_cache(machine.header)  # type: ignore[assignment]
    machine.header()


def _child(config: TrainConfig, folder: Path, resume: bool, strike: Callable[[], None]) -> None:
    code = 1
    try:
        with (folder / "output.txt").open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        if config.net == "lenet-300-100":
            models.build = lambda net, **options: small_net(**options)  # type: ignore[assignment]
        strike()
        loop.train(config, folder, resume)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def run(
    config: TrainConfig,
    folder: Path,
    *,
    resume: bool = False,
    strike: Callable[[], None] = lambda: None,
    kill_after: float | None = None,
) -> bool:
    """Train in a child; True if it was killed, False if it ended well.

    Raises RuntimeError with its output if it failed otherwise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        _child(config, folder, resume, strike)
    if kill_after is not None:
        time.sleep(kill_after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if status:
        raise RuntimeError(f"a run failed: {(folder / 'output.txt').read_text()}")
    return False


# ---- what must be equal ------------------------------------------------------------------------


def newest_step(folder: Path) -> tuple[int, int]:
    """(number, step) of the newest good checkpoint, (0, 0) if there is none."""
    for path in checkpoint_files.checkpoint_folders(folder / "checkpoints"):
        with contextlib.suppress(checkpoint_files.CheckpointError):
            return checkpoint_files._number(path), checkpoint_files.read(path).step
    return 0, 0


def outcome(folder: Path) -> dict[str, Any]:
    """The end of a run without its clock: weights, patterns, optimizer, masks, losses, accuracy."""
    path = checkpoint_files.checkpoint_folders(folder / "checkpoints")[0]
    state = checkpoint_files.read(path).state
    return {key: _without_clock(value) for key, value in state.items()}


_CLOCK = {"seconds", "elapsed", "step_times", "epoch_seconds", "step_seconds", "mean_step_seconds",
          "folder", "baseline", "memory", "numpy", "python"}  # fmt: skip
# Memory counts lists that kernels make after some calls of one process: more calls, more lists.


# numpy's and Python's generators are not seeded by a training, and not used either.
def _without_clock(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_clock(value) for key, value in tree.items() if key not in _CLOCK}
    return [_without_clock(item) for item in tree] if isinstance(tree, (list, tuple)) else tree


def differences(first: Any, second: Any, path: str = "") -> list[str]:
    """Where two outcomes differ, to the bit."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        same = first.dtype == second.dtype and torch.equal(first, second)
        return [] if same else [path]
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return [d for k in first for d in differences(first[k], second[k], f"{path}/{k}")]
    if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        pairs = enumerate(zip(first, second, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{path}/{i}")]
    return [] if first == second else [path]


def strike_at(point: str, draw: random.Random) -> Callable[[], None]:
    """A kill at `point`, at one of its calls: early ones more often, so that few runs escape."""
    most, install = POINTS[point]
    return functools.partial(install, 1 + int(most * draw.random() ** 3))
