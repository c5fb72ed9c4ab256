"""Hyper-parameters of SparseMomentum, checked when made, and the rules behind their names."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from .rules import (
    GROWTH_RULES,
    PRUNE_RULES,
    REDISTRIBUTION_RULES,
    GrowthRule,
    PruneRule,
    RedistributionRule,
    grow_random,
)
from .schedule import DECAYS, Decay, UpdateSchedule
from .signals import SIGNALS
from .structured import GrowInGroups, PruneInGroups, group_size, is_structured
from .update import RuleSet

logger = logging.getLogger(__name__)

_IN_GROUPS: dict[str, Any] = {"prune": PruneInGroups, "growth": GrowInGroups}


@dataclass(frozen=True)
class SparseMomentumConfig:
    """Hyper-parameters (see SparseMomentum); checked when made."""

    total_steps: int
    update_every: int
    prune_rate: float = 0.5
    final_prune_rate: float = 0.005
    decay: str | Decay = "cosine"
    prune: str | PruneRule = "magnitude"
    growth: str | GrowthRule = "momentum"
    redistribution: str | RedistributionRule = "momentum"
    signal: str = "gradient"
    window_tolerance: float = 0.1
    sample_share: float = 0.1
    dense_above: float | None = None
    update_until: float = 1.0
    final_density: float | None = None
    cost_weight: float = 0.0
    cost_budget: float | str | None = None
    spare_dense: bool = True

    def __post_init__(self) -> None:
        UpdateSchedule(self.total_steps, self.update_every)
        self._check_ranges()
        self._check_costs()
        self._check_rules()
        self._check_updates()

    def _check_ranges(self) -> None:
        for name in ("prune_rate", "final_prune_rate", "dense_above", "final_density"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {value!r}")
        if not 0.0 < self.update_until <= 1.0:
            raise ValueError(f"update_until must be in (0, 1], got {self.update_until!r}")
        if not 0.0 < self.window_tolerance < 1.0:
            raise ValueError(f"window_tolerance must be in (0, 1), got {self.window_tolerance!r}")
        if not 0.0 < self.sample_share <= 1.0:
            raise ValueError(f"sample_share must be in (0, 1], got {self.sample_share!r}")

    def _check_rules(self) -> None:
        tables = (("decay", DECAYS), ("prune", PRUNE_RULES), ("growth", GROWTH_RULES))
        for name, table in (*tables, ("redistribution", REDISTRIBUTION_RULES)):
            _look_up(name, getattr(self, name), table)
        if self.signal not in SIGNALS:
            raise ValueError(f"signal must be one of {', '.join(SIGNALS)}, got {self.signal!r}")
        if self.signal == "sampled" and (self.growth == "neuron" or is_structured(self.growth)):
            raise ValueError(
                f"growth={self.growth!r} compares whole rows, of which signal='sampled' knows a "
                "sample; choose 'exact', 'window' or 'gradient'"
            )
        moves = self.redistribution != "none" or self.prune == "global_magnitude"
        if moves and str(self.growth).startswith("groups:"):
            raise ValueError(
                f"growth={self.growth!r} keeps N weights in every group only while a layer keeps "
                f"its number of weights; choose redistribution='none' (got "
                f"{self.redistribution!r}) and prune='groups:M', 'magnitude' or 'set' (got "
                f"{self.prune!r})"
            )
        shrinks = self.final_density is not None and self.prune != self.growth
        if shrinks and str(self.growth).startswith("groups:"):
            raise ValueError(
                f"growth={self.growth!r} with final_density={self.final_density} removes weights "
                f"for good, and only prune={self.growth!r} removes them evenly from the groups; "
                f"got prune={self.prune!r}"
            )
        if self.signal == "random" and self.growth == "neuron":
            raise ValueError(
                "growth='neuron' ranks rows by a dense signal, but signal='random' has none; "
                "choose signal='exact', 'window' or 'gradient'"
            )

    def _check_updates(self) -> None:
        if self.schedule().next_update(1) is not None:
            return
        what = (
            f"no mask update falls into {self._mask_steps} steps with update_every="
            f"{self.update_every}"
        )
        if self.final_density is not None:
            raise ValueError(f"{what}: final_density={self.final_density} would not be reached")
        if self.prune_rate > 0:
            logger.warning("%s: the masks stay as they are", what)

    def _check_costs(self) -> None:
        if not 0.0 <= self.cost_weight < float("inf"):
            raise ValueError(f"cost_weight must be finite and >= 0, got {self.cost_weight!r}")
        budget = self.cost_budget
        if isinstance(budget, str) and budget != "start":
            raise ValueError(f"cost_budget must be a number, 'start' or None, got {budget!r}")
        if budget is not None and budget != "start" and not 0.0 < float(budget) <= 1.0:
            raise ValueError(
                "cost_budget must be in (0, 1], the share of the dense layers' cost, or 'start', "
                f"got {budget!r}"
            )

    def schedule(self) -> UpdateSchedule:
        """Mask updates end after the share `update_until` of all steps."""
        return UpdateSchedule(self._mask_steps, self.update_every)

    @property
    def _mask_steps(self) -> int:
        # As it is written: 0.55 of 100 are 55 steps, in floating point 56.
        return max(1, math.ceil(Fraction(repr(float(self.update_until))) * self.total_steps))

    def density_progress(self, step: int) -> float:
        """How far gradual pruning is after `step` steps, in [0, 1]; 1 at the last update."""
        last = (self._mask_steps - 1) // self.update_every * self.update_every
        return min(1.0, step / last) if last else 1.0

    @property
    def effective_signal(self) -> str:
        """The kind of signal in use, one of SIGNALS.

        The growth rules "random" and "gradient" bring their own signal of that name, whatever
        `signal` says; every other growth rule is given `signal`.
        """
        return self.growth if self.growth in ("random", "gradient") else self.signal

    def decayed_rate(self, step: int) -> float:
        """Prune rate after `step` steps."""
        decay: Decay = _look_up("decay", self.decay, DECAYS)
        progress = min(1.0, step / self._mask_steps)
        return decay(self.prune_rate, self.final_prune_rate, progress)

    def rule_set(self) -> RuleSet:
        """The rules behind the names.

        The signal "random" ranks nothing, so "momentum" then grows at random; a callable is called
        all the same, with scores None.
        """
        growth = _look_up("growth", self.growth, GROWTH_RULES)
        random = self.effective_signal == "random" and self.growth == "momentum"
        return RuleSet(
            prune=_look_up("prune", self.prune, PRUNE_RULES),
            growth=grow_random if random else growth,
            redistribution=_look_up("redistribution", self.redistribution, REDISTRIBUTION_RULES),
            spare_dense=self.spare_dense,
        )


def _look_up(name: str, value: Any, table: dict[str, Any]) -> Any:
    if callable(value):
        return value
    if name in _IN_GROUPS and is_structured(value):
        return _IN_GROUPS[name](group_size(value))
    if not isinstance(value, str) or value not in table:
        names = [*table, *(("fan_in", "groups:M") if name in _IN_GROUPS else ())]
        raise ValueError(f"{name} must be one of {', '.join(names)} or a callable, got {value!r}")
    return table[value]
