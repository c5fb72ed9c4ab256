"""How to time without fooling oneself, and where a machine's results go."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from sparse_kernels.workbench.machine import cpu_name


class Timing(NamedTuple):
    """Seconds per call: the median over rounds and the spread (first and third quartile)."""

    median: float
    low: float
    high: float


def machine_name(device: torch.device) -> str:
    """Folder name of this machine's results: the GPU's or the CPU's name in letters, digits and
    dashes.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def wait(device: torch.device) -> None:
    """Wait until the device has done everything; nothing to do on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_interleaved(
    contenders: dict[str, Callable[[], object]],
    device: torch.device,
    rounds: int,
    round_seconds: float,
) -> dict[str, Timing]:
    """Time the contenders in turn, round by round, so that a slow spell of the machine hits all of
    them.

    Each is called once to warm up and once to choose how many calls fill `round_seconds`.
    """
    repeats = {}
    for name, call in contenders.items():
        call()
        wait(device)
        seconds = max(_seconds(call, 1, device), 1e-7)
        repeats[name] = max(1, min(10_000, round(round_seconds / seconds)))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            samples[name].append(_seconds(call, repeats[name], device) / repeats[name])
    return {name: _summary(values) for name, values in samples.items()}


def _seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait(device)
    return time.perf_counter() - start


def _summary(values: list[float]) -> Timing:
    if len(values) < 2:
        return Timing(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high)
