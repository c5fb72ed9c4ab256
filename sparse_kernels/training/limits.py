"""What bounds an update beside its rules: the density that is to be reached, and the cost."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

from .blocks import BlockGrid
from .budget import Costs
from .config import SparseMomentumConfig
from .signals import LayerSignal
from .update import RuleSet

logger = logging.getLogger(__name__)


class Limits:
    """Gradual pruning to `final_density` and costs of layers, worked out for each update.

    cost: by layer the cost of one weight (FLOPs, seconds), > 0; None without cost_weight and
    cost_budget. Raises ValueError for a cost that is missing or not above 0, and for a budget that
    the pattern exceeds now.

    What was measured decides masks, so it is part of the state: the ranks of a job take rank 0's,
    and a training that goes on from a checkpoint takes the checkpoint's.

    Attributes:
        costs: the cost of one weight by layer; empty: weights cost nothing.
        start: stored blocks by layer before the first update; None until then.
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
        self.start: dict[str, int] | None = None
        self.costs = self._given(cost)
        if config.cost_budget is not None:
            self._check_start()

    def at(self, step: int) -> RuleSet:
        """The rules of the update after `step` steps."""
        if self.start is None:
            self.start = self._now()
        if self.config.final_density is None and not self.costs:
            return self.rules
        shrink = self._shrink(self.start, step)
        return replace(self.rules, shrink=shrink, costs=self._costs(self.start))

    # ---- ranks and checkpoints -----------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Entries of SparseMomentum's: `costs` (one weight, by layer) and `start` (blocks)."""
        start = None if self.start is None else dict(self.start)
        return {"costs": dict(self.costs), "start": start}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the entry, if `state_dict` entries are none of these layers."""
        if state.get("costs", {}) != {}:
            self._check_costs(state["costs"], "costs of the checkpoint")
        elif "costs" in state:
            _check_unused(state["config"])
        start = state.get("start")
        if start is None:
            history = state["history"]
            start = self._now() | history[0]["nnz_before"] if history else self._now()
        right = isinstance(start, dict) and start.keys() == self.blocks.keys()
        if not (right and all(type(n) is int for n in start.values())) or not all(
            0 <= n <= self.blocks[name] for name, n in start.items()
        ):
            raise ValueError(
                "stored blocks before the first update: expected a count for each of the layers "
                f"with these numbers of blocks {self.blocks}, got {start!r:.200}"
            )

    def load_state(self, state: Mapping[str, Any]) -> str | None:
        """Take the costs and the start of what `check_state` has found right.

        The costs given to this object serve where the checkpoint's training had none, and where
        the checkpoint was written before costs were stored: then a text says so, to be warned of.
        """
        start, history = state.get("start"), state["history"]
        if start is None and history:  # written before it was stored
            start = self._now() | history[0]["nnz_before"]
        self.start = None if start is None else dict(start)
        if not self.costs:
            return None
        if "costs" not in state:
            return (
                "the checkpoint was written before costs of weights were stored: the costs given "
                "to this SparseMomentum are used, and the masks are those of the uninterrupted "
                "training only if it was given the same"
            )
        given, held = self.costs, state["costs"]
        self.take_costs(held)
        if self.costs != given:
            pairs = (f"{name!r} {held[name]:.6g} for {c:.6g}" for name, c in given.items())
            logger.warning(
                "costs of weights are the checkpoint's, not those given here: %s; for others make "
                "a SparseMomentum without loading its state",
                ", ".join(pairs),
            )
        return None

    def take_costs(self, costs: Mapping[str, float]) -> None:
        """Use these, which were checked, from here on; {} keeps the own ones."""
        if self.costs and costs:
            self.costs = {name: float(cost) for name, cost in costs.items()}

    # ---- gradual pruning -----------------------------------------------------------------------

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
            first = [start[s.name] for s in members]
            # Where the start is not uniform, neither is the end: layers keep their proportions.
            total = round(density * sum(self.blocks[s.name] for s in members))
            last = shared(min(total, sum(first)), first)
            over = [
                s.layer.pattern.nnzb - self._wanted(begin, end, step)
                for s, begin, end in zip(members, first, last, strict=True)
            ]
            shrink.update(zip((s.name for s in members), shared(sum(over), over), strict=True))
        return shrink

    def _wanted(self, start: int, final: int, step: int) -> int:
        """Blocks of a layer on its way from `start` to `final`, by a cubic as in Zhu & Gupta 2017
        (arXiv 1710.01878).
        """
        final = min(start, max(1, final))
        rest = (1.0 - self.config.density_progress(step)) ** 3
        return final + round(rest * (start - final))

    def _now(self) -> dict[str, int]:
        return {s.name: s.layer.pattern.nnzb for s in self.signals}

    # ---- costs ---------------------------------------------------------------------------------

    @property
    def _per_block(self) -> dict[str, float]:
        sizes = {s.name: math.prod(s.layer.block) for s in self.signals}
        return {name: cost * sizes[name] for name, cost in self.costs.items()}

    def _costs(self, start: Mapping[str, int]) -> Costs | None:
        if not self.costs:
            return None
        budget = self._budget(start)
        if budget is not None:  # layers frozen meanwhile cost what they cost
            frozen = {s.name: s.layer.pattern.nnzb for s in self.signals if s.frozen}
            budget -= self._total(frozen)
        return Costs(self._per_block, self.config.cost_weight, budget)

    def _budget(self, start: Mapping[str, int]) -> Fraction | None:
        wanted = self.config.cost_budget
        if wanted is None:
            return None
        if isinstance(wanted, str):
            return self._total(start)
        return Fraction(wanted) * self._dense()

    def _dense(self) -> Fraction:
        """Of all elements inside the matrices, of which partial blocks have few: a stored block
        counts as a whole one, so what is kept under a share of this is under it in fact.
        """
        layers = ((s.name, s.layer.matrix_shape) for s in self.signals)
        return sum((math.prod(shape) * Fraction(self.costs[name]) for name, shape in layers),
                   Fraction(0))  # fmt: skip

    def _total(self, counts: Mapping[str, int]) -> Fraction:
        per_block = self._per_block
        return sum((n * Fraction(per_block[k]) for k, n in counts.items()), Fraction(0))

    def _given(self, cost: Mapping[str, float] | None) -> dict[str, float]:
        """The costs of the trained layers as plain numbers."""
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
        costs = {s.name: float(cost[s.name]) for s in self.signals}
        self._check_costs(costs, "cost")
        return costs

    def _check_costs(self, costs: Any, what: str) -> None:
        if not isinstance(costs, dict) or costs.keys() != self.blocks.keys():
            raise ValueError(
                f"{what}: expected a number for each of the layers {list(self.blocks)}, got "
                f"{costs!r:.200}"
            )
        for s in self.signals:
            found = costs[s.name]
            number = isinstance(found, (int, float)) and not isinstance(found, bool)
            if not number or not 0.0 < found < math.inf:
                raise ValueError(
                    f"{what} of layer {s.name!r} must be above 0 and finite, got {found!r:.60}"
                )
            whole = math.prod(s.layer.block) * self.blocks[s.name]
            if not found < sys.float_info.max / (whole * len(self.blocks)):
                raise ValueError(
                    f"{what} of layer {s.name!r}: {found!r:.60} for each of {whole} weights is "
                    "more than a float64 holds; give costs in a larger unit"
                )

    def _check_start(self) -> None:
        now = self._now()
        budget, held = self._budget(now), self._total(now)
        assert budget is not None
        if held > budget:
            share = float(held / self._dense())
            raise ValueError(
                f"the pattern, its partial blocks counted as whole ones, costs {share:.6g} of the "
                f"dense layers, above cost_budget={self.config.cost_budget}; start sparser, raise "
                "the budget, or pass cost_budget='start' to hold what the pattern costs now"
            )


def _check_unused(config: Mapping[str, Any]) -> None:
    """A checkpoint without costs must be of a training without a use for them."""
    if config["cost_weight"] or config["cost_budget"] is not None:
        raise ValueError(
            "costs of the checkpoint: expected a number for each layer, since its config has "
            f"cost_weight={config['cost_weight']!r} and cost_budget={config['cost_budget']!r}, got "
            "none"
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
