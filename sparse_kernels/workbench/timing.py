"""Time contenders fairly: warmed up, one after the other in every round, median and spread."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import torch

_MAX_REPEATS = 10_000


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of ``rounds`` samples and their first and third quartile."""

    median: float
    low: float
    high: float
    rounds: int
    samples: tuple[float, ...] = ()  # in order of time

    def as_dict(self) -> dict[str, object]:
        """The fields, for JSON."""
        return asdict(self)


def summarize(samples: list[float]) -> Timing:
    """Median and quartiles of at least one sample in seconds."""
    if not samples:
        raise ValueError("summarize: expected at least one sample, got none")
    if len(samples) == 1:
        low = median = high = samples[0]
    else:
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, low, high, len(samples), tuple(samples))


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    *,
    budget: float | None = None,
    min_seconds: float = 0.0,
    device: torch.device | None = None,
) -> dict[str, Timing]:
    """Call each contender once per round, so that a drift of the machine meets all alike.

    warmup: calls of each contender before the clock runs.
    budget: seconds after which no new round begins; at least three are made (or ``rounds``, if
        that is less), whatever they take.
    min_seconds: a sample is the mean over so many calls that they last about as long: the clock
        and the Python around a call of microseconds would be measured instead.
    device: wait for it before reading the clock (a GPU computes behind the caller's back).
    """
    repeats = {}
    for name, call in contenders.items():
        for _ in range(warmup):
            call()
        seconds = _seconds(call, 1, device) if min_seconds > 0 else 1.0
        repeats[name] = max(1, min(_MAX_REPEATS, round(min_seconds / max(seconds, 1e-7))))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    enabled = gc.isenabled()
    gc.disable()
    start = time.perf_counter()
    try:
        for done in range(rounds):
            if budget is not None and done >= 3 and time.perf_counter() - start > budget:
                break
            for name, call in contenders.items():
                samples[name].append(_seconds(call, repeats[name], device) / repeats[name])
    finally:
        if enabled:
            gc.enable()
    return {name: summarize(values) for name, values in samples.items()}


def _seconds(call: Callable[[], object], repeats: int, device: torch.device | None) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
