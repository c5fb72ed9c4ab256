"""By how many bytes a process grows to train: a process of its own, started by bench.networks.

It reads {"net": "vgg16-d", "contender": "sparse", ...}, a TrainConfig, from its standard input
and answers {"bytes": ..., "isa": ...}: it must run with the kernels of the process that asks.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
    # Libraries that load at the first product belong to the process, not to the net.
    torch.nn.Conv2d(3, 3, 3)(torch.zeros(1, 3, 8, 8)).sum().backward()
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
