"""By how many bytes a process grows to train: a process of its own, started by bench.networks.

It reads {"net": "vgg16-d", "contender": "sparse", ...}, a TrainConfig, from its standard input
and answers {"bytes": ..., "isa": ...}: it must run with the kernels of the process that asks.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import re
import resource
import sys
from pathlib import Path

import torch

from .. import machine
from ..config import TrainConfig
from ..contenders import build_dense, build_sparse
from .nets import FAR, random_batch
from .networks import SIGNAL, UPDATE_EVERY

_STEPS = 3


def measure(config: TrainConfig, contender: str) -> int:
    """Bytes between the process before the net is built and its highest point over a few steps.

    ``contender``: "sparse" (usual steps), "sparse, signal" (steps that gather the growth signal,
    and the mask update after them) or a dense layout.
    """
    config = dataclasses.replace(config, update_every=None)  # each contender has its own
    torch.set_num_threads(config.threads or torch.get_num_threads())
    batch = random_batch(config)
    _load_libraries(config)
    _forget_peak()
    before = _status("VmRSS")
    steps = _STEPS
    if contender == "sparse":
        built = build_sparse(config, 0, 100 * FAR, FAR)
    elif contender == SIGNAL:
        built = build_sparse(config, 0, 100 * UPDATE_EVERY, UPDATE_EVERY)
        steps = UPDATE_EVERY + 1
    else:
        built = build_dense(config, 0, contender)
    for _ in range(steps):
        built.step(*batch)
    return max(0, _status("VmHWM") - before)


def _load_libraries(config: TrainConfig) -> None:
    """Train a small net of convolutions and products, sparse and dense, and forget it.

    What is imported or loaded at a first step belongs to the process, not to the net: 80 MB for
    torch's optimizers, and as much again where Triton is installed.
    """
    small = dataclasses.replace(config, net="lenet-5-caffe", batch_size=2, block="1x1")
    batch = random_batch(small)
    for contender in (build_sparse(small, 0, 2, 1), build_dense(small, 0, "contiguous")):
        contender.step(*batch)
    del contender
    gc.collect()
    # What the small net gave back would hide as much of the net that is measured. glibc only.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _forget_peak() -> None:
    """Let Linux forget the highest point of start-up; where it may not, that point stays."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> int:
    """VmRSS (resident now) or VmHWM (at most so far) in bytes.

    Not ru_maxrss where /proc is: on Linux it survives fork and exec, so that a child starts with
    the highest point of the process that started it.
    """
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    except OSError:
        found = None
    if found:
        return 1024 * int(found[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    request = json.load(sys.stdin)
    name = request.pop("contender")
    request["seeds"] = tuple(request["seeds"])
    print(json.dumps({"bytes": measure(TrainConfig(**request), name),
                      "isa": machine.header()["isa"]}))  # fmt: skip
