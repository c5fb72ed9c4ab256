"""When a mask update happens and how much it prunes.

Source: Dettmers & Zettlemoyer 2019 (arXiv 1907.04840) and its official code: the prune rate is
stepped once per batch; an update happens at the end of every epoch but the last, or every k steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

Decay = Callable[[float, float, float], float]
"""decay(initial_rate, final_rate, progress in [0, 1]) -> prune rate in [0, 1]."""


def cosine_decay(initial: float, final: float, progress: float) -> float:
    """Prune rate on half a cosine from `initial` (progress 0) to `final` (progress 1)."""
    return final + (initial - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def linear_decay(initial: float, final: float, progress: float) -> float:
    """Prune rate on a straight line from `initial` to 0; `final` is not used, as in the official
    code.
    """
    del final
    return initial * (1.0 - progress)


def constant_rate(initial: float, final: float, progress: float) -> float:
    """`initial` all the time, as in SET; neither `final` nor `progress` is used."""
    del final, progress
    return initial


DECAYS: dict[str, Decay] = {
    "cosine": cosine_decay,
    "linear": linear_decay,
    "constant": constant_rate,
}


@dataclass(frozen=True)
class UpdateSchedule:
    """Mask updates after steps k, 2k, 3k, ... that come before the last step.

    Steps are counted from 1 (the number of optimizer steps done). With `update_every` = batches of
    an epoch this is "at the end of every epoch but the last".

    Raises ValueError unless total_steps and update_every are integers of at least 1.
    """

    total_steps: int
    update_every: int

    def __post_init__(self) -> None:
        for name in ("total_steps", "update_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"{name} must be an integer >= 1 (optimizer steps), got {value!r}; for one "
                    "update per epoch use update_every = len(loader), total_steps = epochs * "
                    "len(loader)"
                )

    def is_update(self, step: int) -> bool:
        """True if the mask is updated after `step` optimizer steps."""
        return 0 < step < self.total_steps and step % self.update_every == 0

    def next_update(self, step: int) -> int | None:
        """First update at or after `step`, or None if no update is left."""
        candidate = max(1, -(-step // self.update_every)) * self.update_every
        return candidate if candidate < self.total_steps else None

    def window_start(self, step: int, length: int | None) -> int | None:
        """First step of the window of `length` steps that ends with the next update at or after
        `step`.

        length None means "always": the window starts at step 1. None is returned if no update is
        left.
        """
        update = self.next_update(step)
        if update is None:
            return None
        return 1 if length is None else max(1, update - length + 1)

    def in_window(self, step: int, length: int | None) -> bool:
        """True if the gradients of `step` are among the last `length` (None: all) before an
        update.
        """
        start = self.window_start(step, length)
        return length != 0 and start is not None and step >= start

    def next_opening(self, step: int, length: int | None) -> int | None:
        """First step of the window (see `window_start`) if it lies after `step`, else None."""
        start = self.window_start(step, length)
        return start if length != 0 and start is not None and start > step else None


def window_length(beta: float, tolerance: float) -> int:
    """Smallest L >= 1 with beta**L <= tolerance: momentum over L steps is short of the full one by
    beta**L.

    Raises ValueError unless 0 <= beta < 1 and 0 < tolerance < 1.
    """
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"momentum coefficient must be in [0, 1) for a finite window, got {beta}")
    if not 0.0 < tolerance < 1.0:
        raise ValueError(f"window_tolerance must be between 0 and 1 (exclusive), got {tolerance}")
    if beta == 0.0:
        return 1
    length = max(1, math.floor(math.log(tolerance) / math.log(beta)) - 1)
    while beta**length > tolerance:  # the logarithm only gives a start: the definition decides
        length += 1
    return length
