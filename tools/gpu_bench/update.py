"""Mask updates of ResNet-50: milliseconds of one update of all layers (issue 5: under 5 ms)."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparse_kernels import SparseMomentum
from sparse_kernels.nn import sparsify
from sparse_kernels.training import reserve
from tools.gpu_bench.layers import Settings, Task, label_of

# He et al. 2015, arXiv 1512.03385, table 1: width and blocks of the four stages.
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
SMALL_STAGES = ((16, 1), (32, 1))
BATCH = 4


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 (four times as wide) beside the input, or beside a 1x1 of it."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width),
        )  # fmt: skip
        self.short: nn.Module = nn.Identity()
        if stride != 1 or inputs != 4 * width:
            self.short = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = nn.functional.relu(self.path(x) + self.short(x))
        return y


def resnet(stages: tuple[tuple[int, int], ...], classes: int) -> nn.Sequential:
    """ResNet-50's layers without its first pooling: images may be small."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, stages[0][0], 7, 2, 3, bias=False), nn.BatchNorm2d(stages[0][0]), nn.ReLU(),
    ]  # fmt: skip
    inputs = stages[0][0]
    for index, (width, blocks) in enumerate(stages):
        for block in range(blocks):
            layers.append(Bottleneck(inputs, width, 2 if block == 0 and index else 1))
            inputs = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def updates(settings: Settings) -> Iterator[Task]:
    """A row per block and signal."""
    for block in ((1, 1), (16, 16)):
        for signal in ("exact",) if settings.small else ("exact", "gradient", "random"):
            key = f"update {label_of(0.1, block)} {signal}"
            yield key, functools.partial(update_row, block, signal, settings)


def update_row(block: tuple[int, int], signal: str, settings: Settings) -> dict[str, Any]:
    """Wall time from a finished training step to a finished update, the device waited for.

    ``update_every=1``: every step of a small batch is followed by an update. The first two make
    tables and compile kernels, and do not count.
    """
    torch.manual_seed(0)
    stages, classes = (SMALL_STAGES, 16) if settings.small else (STAGES, 1000)
    rounds = 3 if settings.small else 20
    model = resnet(stages, classes)
    weights = sum(p.numel() for p in model.parameters())
    sparsify(model, density=0.1, block=block, exclude=["0"])
    seconds, removed = timed(model.to(settings.device), signal, rounds + 2, settings)
    if not removed:
        raise RuntimeError("expected updates that move blocks; an update of nothing is not timed")
    counted = seconds[2:]
    return {
        "shape": f"mask update {label_of(0.1, block)}, signal {signal}",
        "batch": BATCH,
        "precision": "fp32",
        "update": {
            "milliseconds": 1e3 * statistics.median(counted),
            "quartiles": [1e3 * q for q in statistics.quantiles(counted, n=4)[::2]],
            "updates": len(counted),
            "removed_blocks": removed,
            "dense_weights": weights,
        },
    }


def timed(model: nn.Module, signal: str, steps: int, settings: Settings) -> tuple[list[float], int]:
    """Seconds of the update after each step, and how many blocks they removed in all."""
    device, side = settings.device, 16 if settings.small else 64
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    reserve(model, optimizer, room=float("inf"))
    masks = SparseMomentum(
        model, optimizer, total_steps=4 * steps, update_every=1, signal=signal, dense_above=1.0,
        **({} if signal != "gradient" else {"growth": "gradient"}),
    )  # fmt: skip
    x, target = torch.randn(BATCH, 3, side, side, device=device), torch.arange(BATCH, device=device)
    seconds: list[float] = []
    removed = 0
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=False)
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()
        _wait(device)
        start = time.perf_counter()
        record = masks.step()
        _wait(device)
        seconds.append(time.perf_counter() - start)
        if record is None:
            raise RuntimeError("expected a mask update after every step, got none")
        removed += record.removed
    return seconds, removed


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
