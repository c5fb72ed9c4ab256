"""Which variant of the native kernels serves a product: "rule", or what a measurement found faster.

The native core chooses kernels and cuts by built-in rules.  csrc/variants.h lists the other choices
there are; a process-wide table says which problems take one.  Here the choice is made by time:
first all that apply in turns, then the fastest against the rule once more, because the best of many
noisy times is partly luck.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sparse_kernels._load import native
from sparse_kernels.plan_measure import Measured

#: What the built-in rules choose.
RULE = "rule"

Measure = Callable[..., Measured]


class Choice(NamedTuple):
    """A variant's name, and how much faster than the rule it was (time / time; 1 for the rule)."""

    name: str
    gain: float = 1.0


def names() -> list[str]:
    """Every variant there is, ``RULE`` first.

    Raises:
        ImportError: the native module is not built.
    """
    found: list[str] = native().variant_names()
    return found


def clear() -> None:
    """Let every product take the rule again."""
    native().clear_variants()


def choose(
    variants: Any,
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    measure: Measure,
) -> Choice:
    """The variant to take, which is in use afterwards.

    Args:
        variants: the ``_native.ProductVariants`` of the product.
        calls: the product by the name of the variant, ``RULE`` first.
        seconds: cap on the time of all comparisons together.
        measure: ``plan_measure.measure`` or a stand-in.

    Returns:
        The choice.  A variant is taken only if a race against the rule alone says for certain that
        it is faster, and by more than ``plan_measure.INDIFFERENT``; where noise leaves that open,
        the rule stays.
    """
    variants.use(RULE)
    if len(calls) < 2:
        return Choice(RULE)

    def using(name: str) -> Callable[[], object]:
        def run() -> None:
            variants.use(name)
            calls[name]()

        return run

    try:
        first = measure({name: using(name) for name in calls}, seconds=0.6 * seconds)
        best = first.best
        if best == RULE:
            return Choice(RULE)
        duel = measure({RULE: using(RULE), best: using(best)}, seconds=0.4 * seconds)
    finally:
        variants.use(RULE)
    if duel.best != best or duel.settled != "certain":
        return Choice(RULE)
    variants.use(best)
    return Choice(best, duel.ratio(RULE, best))
