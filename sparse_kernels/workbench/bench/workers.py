"""Where data parallel training stops to scale: computed from a measured step and counted bytes.

The model: a step of one worker takes `seconds`; averaging B bytes over w workers by a ring moves
2 (w - 1) / w * B through every link (Patarasuk and Yuan 2009) in 2 (w - 1) rounds, so that

    c(w) = 2 (w - 1) / w * B / bandwidth + 2 (w - 1) * latency

Nothing is overlapped: DDP hides part of c behind the backward pass, so these are lower bounds of
what can be reached (with full overlap a step takes the larger of the two, at most half of the sum).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ...nn import SparseLayer
from .. import account, machine
from ..config import TrainConfig
from ..contenders import build_dense, build_sparse
from ..models import spec
from ..timing import interleave
from .results import markdown

MOST_WORKERS = 1 << 16
GIGABIT = 1e9 / 8
"""Bytes per second of a link of 1 Gbit/s."""


@dataclass(frozen=True)
class Load:
    """What one worker does per step. batch: examples; seconds: of a step alone; bytes per step."""

    name: str
    batch: int
    seconds: float
    gradient_bytes: float
    update_bytes: float  # of mask updates, as an average per step

    @property
    def step_bytes(self) -> float:
        """Bytes that are averaged per step, mask updates included."""
        return self.gradient_bytes + self.update_bytes


def communication(size: float, workers: int, bandwidth: float, latency: float) -> float:
    """Seconds of averaging `size` bytes over a ring of `workers`.

    bandwidth: bytes per second of a link; latency: seconds of a round.
    """
    rounds = 2 * (workers - 1)
    return rounds / workers * size / bandwidth + rounds * latency


def efficiency(
    load: Load, workers: int, bandwidth: float, latency: float, *, strong: bool
) -> float:
    """Share of a step that is computing.

    strong: the workers share one batch of `load`, and each computes 1 / workers of the time; else
    each has a batch of its own.
    """
    computing = load.seconds / workers if strong else load.seconds
    return computing / (computing + communication(load.step_bytes, workers, bandwidth, latency))


def end_of_scaling(
    load: Load, bandwidth: float, latency: float, *, strong: bool, least: float = 0.5
) -> int:
    """The largest number of workers whose efficiency is at least `least`, up to MOST_WORKERS.

    The efficiency falls with every worker, so halving finds it.
    """

    def holds(workers: int) -> bool:
        return efficiency(load, workers, bandwidth, latency, strong=strong) >= least

    low, high = 1, MOST_WORKERS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def least_bandwidth(load: Load, workers: int, latency: float, least: float = 0.8) -> float | None:
    """Bytes per second at which `workers`, each with a batch of its own, reach `least`.

    None where latency alone takes more.
    """
    left = load.seconds * (1 / least - 1) - 2 * (workers - 1) * latency
    return None if left <= 0 else 2 * (workers - 1) / workers * load.step_bytes / left


# ---- measured and counted ----------------------------------------------------------------------


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the gradients that DistributedDataParallel averages in a step of `model`."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)


def update_bytes(model: nn.Module) -> int:
    """Bytes of one mask update: the dense growth signal once, and rank 0's keys."""
    layers = [m for m in model.modules() if isinstance(m, SparseLayer)]
    signal = sum(layer.values.element_size() * _elements(layer) for layer in layers)
    return signal + sum(8 * layer.pattern.nnzb for layer in layers)


def _elements(layer: SparseLayer) -> int:
    rows, cols = layer.matrix_shape
    return rows * cols


def run(
    config: TrainConfig,
    *,
    rounds: int,
    seconds: float,
    update_every: int,
    bandwidths: Sequence[float],
    latency: float,
) -> dict[str, Any]:
    """Measure a step of the sparse and the dense net, in turns, and compute where scaling ends.

    config: net, density, block, batch size, threads. bandwidths: bytes per second;
    latency: seconds.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    steps = 1_000_000  # no mask update while the clock runs
    nets = {
        "sparse": build_sparse(config, 0, steps, steps - 1),
        "dense": build_dense(config, 0, "contiguous"),
    }
    shape = spec(config.net).input_shape
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(config.batch_size, *shape, generator=generator)
    labels = torch.randint(10, (config.batch_size,), generator=generator)
    calls = {name: partial(net.step, images, labels) for name, net in nets.items()}
    timings = interleave(calls, rounds, warmup=2, budget=seconds)
    loads = []
    for name, net in nets.items():
        update = update_bytes(net.model) / update_every if name == "sparse" else 0.0
        loads.append(
            Load(name, config.batch_size, timings[name].median, gradient_bytes(net.model), update)
        )
    return {
        "net": config.net,
        "density": account.weight_density(account.layer_costs(nets["sparse"].model, {})),
        "machine": machine.one_line(machine.header()),
        "update_every": update_every,
        "latency": latency,
        "loads": loads,
        "spread": {name: (t.low, t.high, t.rounds) for name, t in timings.items()},
        "rows": [row(load, b, latency) for b in bandwidths for load in loads],
    }


def row(load: Load, bandwidth: float, latency: float) -> dict[str, Any]:
    """Where scaling of one load ends at one bandwidth."""
    ends = {
        kind: end_of_scaling(load, bandwidth, latency, strong=kind == "strong")
        for kind in ("strong", "weak")
    }
    return {"name": load.name, "bandwidth": bandwidth, "load": load, **ends}


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    loads = [
        [
            load.name,
            f"{load.seconds * 1e3:.1f}",
            f"{load.gradient_bytes / 1e6:.2f}",
            f"{load.update_bytes / 1e6:.3f}",
            *(_gigabits(least_bandwidth(load, count, found["latency"])) for count in (8, 64)),
        ]
        for load in found["loads"]
    ]
    heads = ["net", "step, ms", "gradients, MB", "masks, MB a step"]
    ends = [
        [
            f"{line['bandwidth'] / GIGABIT:g}",
            line["name"],
            _workers(line["strong"]),
            _images(line["load"], line["strong"], line["bandwidth"], found["latency"]),
            _workers(line["weak"]),
        ]
        for line in found["rows"]
    ]
    return "\n".join(
        [
            f"{found['net']}, density {found['density']:.3g}, batch {found['loads'][0].batch}; "
            f"{found['machine']}",
            "",
            *markdown([*heads, "8 workers, Gbit/s", "64 workers, Gbit/s"], loads),
            "",
            *markdown(
                ["Gbit/s", "net", "one batch shared: workers", "images/s there",
                 "a batch each: workers"], ends, left=2,
            ),
        ]
    )  # fmt: skip


def _gigabits(bandwidth: float | None) -> str:
    return "latency" if bandwidth is None else f"{bandwidth / GIGABIT:.3g}"


def _workers(count: int) -> str:
    return f"over {count}" if count == MOST_WORKERS else str(count)


def _images(load: Load, workers: int, bandwidth: float, latency: float) -> str:
    took = load.seconds / workers + communication(load.step_bytes, workers, bandwidth, latency)
    return f"{load.batch / took:.0f}"
