"""Time contenders fairly: warmed up, one after the other in every round, median and spread."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of ``rounds`` calls and their first and third quartile."""

    median: float
    low: float
    high: float
    rounds: int

    def as_dict(self) -> dict[str, float]:
        """The fields, for JSON."""
        return asdict(self)


def summarize(samples: list[float]) -> Timing:
    """Median and quartiles of at least one sample in seconds."""
    if not samples:
        raise ValueError("summarize: expected at least one sample, got none")
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1)
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, low, high, len(samples))


def interleave(
    contenders: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1
) -> dict[str, Timing]:
    """Call each contender once per round, so that a drift of the machine meets all alike."""
    for call in contenders.values():
        for _ in range(warmup):
            call()
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, call in contenders.items():
                start = time.perf_counter()
                call()
                samples[name].append(time.perf_counter() - start)
    finally:
        if enabled:
            gc.enable()
    return {name: summarize(values) for name, values in samples.items()}
