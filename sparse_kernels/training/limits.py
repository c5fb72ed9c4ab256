"""What bounds an update beside its rules: the density that is to be reached, and the cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from .blocks import BlockGrid
from .budget import Costs
from .config import SparseMomentumConfig
from .signals import LayerSignal
from .update import RuleSet, UpdateRecord


class Limits:
    """Gradual pruning to `final_density` and costs of layers, worked out for each update.

    cost: by layer the cost of one weight (FLOPs, seconds), > 0; None without cost_weight and
    cost_budget. Raises ValueError for a cost that is missing or not above 0, and for a budget that
    the pattern exceeds now.
    """

    def __init__(
        self,
        config: SparseMomentumConfig,
        signals: Sequence[LayerSignal],
        cost: Mapping[str, float] | None,
    ) -> None:
        self.config, self.signals = config, signals
        self.rules = config.rule_set()
        self.blocks = {s.name: BlockGrid.of(s.layer).blocks for s in signals}
        self.per_block = self._per_block(cost)
        if self.per_block:
            self._check_start()

    def at(self, step: int, history: Sequence[UpdateRecord]) -> RuleSet:
        """The rules of the update after `step` steps; history: the updates before it."""
        if self.config.final_density is None and not self.per_block:
            return self.rules
        start = self._now() | (history[0].nnz_before if history else {})
        return replace(self.rules, shrink=self._shrink(start, step), costs=self._costs(start))

    def _shrink(self, start: Mapping[str, int], step: int) -> dict[str, int]:
        """Blocks to lose for good, by layer; the layers of one block shape end at their sum.

        Redistribution and pruning over all layers take a layer off its own curve. What one is
        below it, others may be above: only the excess of the sum goes, from layers above theirs.
        """
        density = self.config.final_density
        if density is None:
            return {}
        shrink: dict[str, int] = {}
        moving = [s for s in self.signals if not s.frozen]
        for block in {s.layer.block: None for s in moving}:
            members = [s for s in moving if s.layer.block == block]
            over = [
                s.layer.pattern.nnzb
                - self._wanted(density, self.blocks[s.name], start[s.name], step)
                for s in members
            ]
            shrink.update(zip((s.name for s in members), shared(sum(over), over), strict=True))
        return shrink

    def _wanted(self, density: float, blocks: int, start: int, step: int) -> int:
        """Blocks of a layer whose density falls from its start by a cubic, as in Zhu & Gupta 2017
        (arXiv 1710.01878).
        """
        final = min(start, max(1, round(density * blocks)))
        rest = (1.0 - self.config.density_progress(step)) ** 3
        return final + round(rest * (start - final))

    def _now(self) -> dict[str, int]:
        return {s.name: s.layer.pattern.nnzb for s in self.signals}

    def _costs(self, start: Mapping[str, int]) -> Costs | None:
        if not self.per_block:
            return None
        budget = self._budget(start)
        if budget is not None:  # layers frozen meanwhile cost what they cost
            frozen = {s.name: s.layer.pattern.nnzb for s in self.signals if s.frozen}
            budget -= self._total(frozen)
        return Costs(self.per_block, self.config.cost_weight, budget)

    def _budget(self, start: Mapping[str, int]) -> Fraction | None:
        wanted = self.config.cost_budget
        if wanted is None:
            return None
        if isinstance(wanted, str):
            return self._total(start)
        return Fraction(wanted) * self._total(self.blocks)

    def _total(self, counts: Mapping[str, int]) -> Fraction:
        return sum((n * Fraction(self.per_block[k]) for k, n in counts.items()), Fraction(0))

    def _per_block(self, cost: Mapping[str, float] | None) -> dict[str, float]:
        if cost is None:
            if self.config.cost_weight or self.config.cost_budget is not None:
                raise ValueError(
                    "cost_weight and cost_budget need the cost of a weight in each layer: pass "
                    "cost=flops_per_weight(model, example) of sparse_kernels.training"
                )
            return {}
        missing = [s.name for s in self.signals if s.name not in cost]
        if missing:
            raise ValueError(f"cost must name every trained sparse layer, missing: {missing}")
        for s in self.signals:
            if not 0.0 < cost[s.name] < math.inf:
                raise ValueError(f"cost of layer {s.name!r} must be above 0, got {cost[s.name]!r}")
        return {s.name: float(cost[s.name]) * math.prod(s.layer.block) for s in self.signals}

    def _check_start(self) -> None:
        now = self._now()
        budget, held = self._budget(now), self._total(now)
        if budget is not None and held > budget:
            share = float(held / self._total(self.blocks))
            raise ValueError(
                f"the pattern costs {share:.6g} of the dense layers, above cost_budget="
                f"{self.config.cost_budget}; start sparser, raise the budget, or pass "
                "cost_budget='start' to hold what the pattern costs now"
            )


def shared(total: int, over: Sequence[int]) -> list[int]:
    """`total` <= the sum of the positive entries of `over`, in whole parts proportional to them.

    No part exceeds its entry; fractions go to the largest remainder, ties to the first. A total
    below 0 is 0.
    """
    weights = [max(0, o) for o in over]
    whole, total = sum(weights), max(0, total)
    if not total:
        return [0] * len(weights)
    counts = [w * total // whole for w in weights]
    order = sorted(range(len(weights)), key=lambda i: (-(weights[i] * total % whole), i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts
