"""When the layers' growth signals listen: the steps in which their probes are there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from .sampled import Sampling
from .schedule import UpdateSchedule
from .signals import LayerSignal

_GATHERING = ("exact", "window", "sampled")


class Windows:
    """Opens and closes the windows of `signals`, which one optimizer trains."""

    def __init__(
        self, signals: Sequence[LayerSignal], schedule: UpdateSchedule, sampling: Sampling
    ) -> None:
        self._signals, self._schedule, self._sampling = signals, schedule, sampling
        self._groups = sorted({s.view.group_index for s in signals})
        self._gathers = any(s.kind in _GATHERING for s in signals)
        self._arm_at = sys.maxsize
        self._armed: list[Any] = []

    def arm(self, step: int) -> None:
        """Make or remove probes for `step`, and find the step when that changes again.

        Closing of a window needs no step of its own: it closes at an update, which arms anew.
        """
        for signal in self._signals:
            signal.arm(self._schedule, step, self._sampling)
        openings = [self._schedule.next_opening(step, s.length()) for s in self._signals]
        self._arm_at = min((o for o in openings if o is not None), default=sys.maxsize)
        self._armed = self._momenta()

    def due(self, step: int) -> bool:
        """Whether `arm` must be called again for `step`, if no update has been meanwhile."""
        return step >= self._arm_at or self._momenta() != self._armed

    def keep_gradients(self, step: int) -> None:
        """Let every signal keep what it needs of the gradients of `step` at an update after it."""
        if self._schedule.is_update(step):
            for signal in self._signals:
                signal.keep_gradient()

    def _momenta(self) -> list[Any]:
        """What window lengths depend on (schedulers such as OneCycleLR change it every step)."""
        if not self._gathers:
            return []
        groups = self._signals[0].view.optimizer.param_groups
        return [(groups[i].get("momentum"), groups[i].get("betas")) for i in self._groups]
