"""Which of some calls is the fastest: timed in turns until the order is certain or does not matter.

A single timing on a busy machine says little.  The contenders run in interleaved rounds, so that a
slow spell hits all of them, and what is judged is the ratio of two times of the SAME round.  The
confidence interval of its median comes from order statistics (the sign test): it assumes nothing
about the shape of the noise.  Clock and calls are arguments, so tests bring their own time.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

#: Two times closer than this do not matter: the order is then that of the arguments.
INDIFFERENT = 0.03
#: Chance that a median lies outside of its interval, on either side.
DOUBT = 0.01
MIN_ROUNDS, MAX_ROUNDS = 7, 400
#: A sample is repeated calls until it lasts this long, so that clock and call overhead vanish.
SAMPLE_SECONDS = 1e-3

Settled = Literal["certain", "equal", "time"]


@dataclass(frozen=True)
class Measured:
    """Result of ``measure``.

    Attributes:
        seconds: median seconds per call, by contender.
        samples: seconds per call of each round, by contender.
        best: the contender to take: the first, in the order given, of those whose ``ratio`` to the
            fastest is at most 1 + ``INDIFFERENT``.
        settled: "certain" (the intervals say who is faster), "equal" (within ``INDIFFERENT``), or
            "time" (the cap came first: ``best`` is the present guess).
    """

    seconds: dict[str, float]
    samples: dict[str, list[float]]
    best: str
    settled: Settled

    @property
    def rounds(self) -> int:
        """Number of interleaved rounds."""
        return len(next(iter(self.samples.values())))

    def ratio(self, name: str, other: str) -> float:
        """Time of ``name`` / time of ``other``, as ``best`` judges it.

        The median of the rounds' ratios where the order is settled.  Where the cap came first, the
        ratio of the lower quartiles: noise only ever adds time, so the fast samples are the truer.
        """
        return _ratio(self.samples, name, other, self.settled)


def median_interval(values: Sequence[float], doubt: float = DOUBT) -> tuple[float, float]:
    """Distribution-free confidence interval of the median; (-inf, inf) for too few values.

    The k-th smallest and k-th largest of n values enclose the median unless fewer than k fell on
    one side of it, which has the probability P(Binomial(n, 1/2) < k); ``doubt`` bounds it per side.
    """
    ordered = sorted(values)
    n = len(ordered)
    below, k = 0.0, 0
    while k < n // 2:
        below += math.comb(n, k) * 0.5**n
        if below > doubt:
            break
        k += 1
    if k == 0:
        return -math.inf, math.inf
    return ordered[k - 1], ordered[n - k]


def measure(
    candidates: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 1.0,
    indifferent: float = INDIFFERENT,
    clock: Callable[[], float] = time.perf_counter,
) -> Measured:
    """Time ``candidates`` against each other for at most about ``seconds``.

    Args:
        candidates: calls without arguments by name, the preferred one first: where a difference
            does not matter, the earlier name wins.
        seconds: cap on the time of the rounds (one warm-up and one calibrating call of each come
            on top); at least 3 rounds are made whatever they last.
        indifferent: relative difference that does not matter.
        clock: seconds, monotonic.

    Raises:
        ValueError: no candidate, a cap that is not positive.
    """
    if not candidates:
        raise ValueError("measure: expected at least one candidate, got none")
    if not seconds > 0:
        raise ValueError(f"measure: seconds must be positive, got {seconds!r}")
    names = list(candidates)
    repeats = {name: _calibrate(candidates[name], clock) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    deadline = clock() + seconds
    settled: Settled = "time"
    for done in range(1, MAX_ROUNDS + 1):
        # Every second round backwards: no contender always runs in the wake of the same other.
        for name in names if done % 2 else reversed(names):
            samples[name].append(_sample(candidates[name], repeats[name], clock))
        if done >= MIN_ROUNDS and (verdict := _verdict(samples, indifferent)) is not None:
            settled = verdict
            break
        if done >= 3 and clock() >= deadline:
            break
    medians = {name: statistics.median(samples[name]) for name in names}
    return Measured(medians, samples, _best(samples, indifferent, settled), settled)


def clock_of(device: torch.device) -> Callable[[], float]:
    """A clock for calls on ``device``, in seconds: what a GPU has queued counts when it is done."""
    if device.type != "cuda":
        return time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def _calibrate(call: Callable[[], object], clock: Callable[[], float]) -> int:
    call()  # caches, lazily made tables, the allocator
    once = _sample(call, 1, clock)
    return max(1, min(1000, math.ceil(SAMPLE_SECONDS / once))) if once > 0 else 1000


def _sample(call: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def _ratios(samples: Mapping[str, list[float]], name: str, other: str) -> list[float]:
    tiny = 1e-12  # a clock may not have moved
    pairs = zip(samples[name], samples[other], strict=True)
    return [max(a, tiny) / max(b, tiny) for a, b in pairs]


def _ratio(
    samples: Mapping[str, list[float]], name: str, other: str, settled: Settled = "certain"
) -> float:
    if settled != "time":
        return statistics.median(_ratios(samples, name, other))
    quartiles = [sorted(samples[key])[len(samples[key]) // 4] for key in (name, other)]
    return max(quartiles[0], 1e-12) / max(quartiles[1], 1e-12)


def _fastest(samples: Mapping[str, list[float]], settled: Settled = "certain") -> str:
    """The name with the smallest ratio to the first one."""
    first = next(iter(samples))
    return min(samples, key=lambda name: _ratio(samples, name, first, settled))


def _best(samples: Mapping[str, list[float]], indifferent: float, settled: Settled) -> str:
    fastest = _fastest(samples, settled)
    for name in samples:
        if _ratio(samples, name, fastest, settled) <= 1 + indifferent:
            return name
    return fastest


def _verdict(samples: Mapping[str, list[float]], indifferent: float) -> Settled | None:
    """Whether the choice can still change: None if so."""
    fastest = _fastest(samples)
    verdict: Settled = "certain"
    for name in samples:
        if name == fastest:
            continue
        low, high = median_interval(_ratios(samples, name, fastest))
        if high <= 1 + indifferent:
            verdict = "equal"
        elif low <= 1:
            return None
        # else: slower for sure; whether by more than the indifference, medians may decide.
    return verdict
