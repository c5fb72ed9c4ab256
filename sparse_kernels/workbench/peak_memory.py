"""By how many bytes a process grows to train: run by bench_step in a process of its own.

echo '{"net": "vgg16-d", "contender": "sparse"}' | python -m sparse_kernels.workbench.peak_memory
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch

from .bench_step import random_batch
from .config import TrainConfig
from .contenders import build_dense, build_sparse

_STEPS = 3
_FAR = 1_000_000  # steps to the first mask update: the window is not entered


def measure(config: TrainConfig, contender: str) -> int:
    """Bytes between the process before the net is built and its highest point over a few steps."""
    torch.set_num_threads(config.threads or torch.get_num_threads())
    batch = random_batch(config)
    # Libraries that load at the first product belong to the process, not to the net.
    torch.nn.Conv2d(3, 3, 3)(torch.zeros(1, 3, 8, 8)).sum().backward()
    before = _resident()
    if contender == "sparse":
        built = build_sparse(config, 0, 100 * _FAR, _FAR)
    else:
        built = build_dense(config, 0, contender)
    for _ in range(_STEPS):
        built.step(*batch)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    return max(0, peak - before)


def _resident() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    except OSError:  # no /proc: the highest point so far is the best there is
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    request = json.load(sys.stdin)
    name = request.pop("contender")
    request["seeds"] = tuple(request["seeds"])
    print(measure(TrainConfig(**request), name))
