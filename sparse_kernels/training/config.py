"""Hyper-parameters of SparseMomentum, checked when made, and the rules behind their names."""

from __future__ import annotations

from dataclasses import dataclass
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
from .update import RuleSet


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
    signal: str = "exact"
    window_tolerance: float = 0.1
    dense_above: float | None = None

    def __post_init__(self) -> None:
        UpdateSchedule(self.total_steps, self.update_every)
        for name in ("prune_rate", "final_prune_rate", "dense_above"):
            if name == "dense_above" and self.dense_above is None:
                continue
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)!r}")
        if not 0.0 < self.window_tolerance < 1.0:
            raise ValueError(f"window_tolerance must be in (0, 1), got {self.window_tolerance!r}")
        tables = (("decay", DECAYS), ("prune", PRUNE_RULES), ("growth", GROWTH_RULES))
        for name, table in (*tables, ("redistribution", REDISTRIBUTION_RULES)):
            _look_up(name, getattr(self, name), table)
        if self.signal not in SIGNALS:
            raise ValueError(f"signal must be one of {', '.join(SIGNALS)}, got {self.signal!r}")

    @property
    def effective_signal(self) -> str:
        """The kind of signal in use, one of the four SIGNALS.

        The growth rules "random" and "gradient" bring their own signal of that name, whatever
        `signal` says; every other growth rule is given `signal`.
        """
        return self.growth if self.growth in ("random", "gradient") else self.signal

    def decayed_rate(self, step: int) -> float:
        """Prune rate after `step` steps."""
        decay: Decay = _look_up("decay", self.decay, DECAYS)
        progress = min(1.0, step / self.total_steps)
        return decay(self.prune_rate, self.final_prune_rate, progress)

    def rule_set(self) -> RuleSet:
        """The rules behind the names.

        The signal "random" ranks nothing, so every named growth rule then grows at random; a
        callable is called all the same, with scores None.
        """
        growth = _look_up("growth", self.growth, GROWTH_RULES)
        random = self.signal == "random" and isinstance(self.growth, str)
        return RuleSet(
            prune=_look_up("prune", self.prune, PRUNE_RULES),
            growth=grow_random if random else growth,
            redistribution=_look_up("redistribution", self.redistribution, REDISTRIBUTION_RULES),
        )


def _look_up(name: str, value: Any, table: dict[str, Any]) -> Any:
    if callable(value):
        return value
    if not isinstance(value, str) or value not in table:
        raise ValueError(f"{name} must be one of {', '.join(table)} or a callable, got {value!r}")
    return table[value]
