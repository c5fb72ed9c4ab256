"""Numbers of a sweep: mean +- standard error, n, and tests over pairs of one seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]
_ROUNDING = 1e-9
"""Points of error: less than a millionth of an image of any test set."""


def label_of(row: Row) -> str:
    """The method, and what the run has otherwise."""
    return f"{row['method']} {row.get('variant', '')}".strip()


def grouped(rows: Sequence[Row]) -> dict[tuple[str, float, str], list[Row]]:
    """Rows by (net, density, label), each group in order of its seeds."""
    groups: dict[tuple[str, float, str], list[Row]] = {}
    for row in sorted(rows, key=lambda r: (r["net"], r["density_asked"], r["seed"])):
        groups.setdefault((row["net"], row["density_asked"], label_of(row)), []).append(row)
    return groups


class Paired(NamedTuple):
    """Test errors in % of two labels over the seeds that both have.

    Of several densities each seed's mean is one pair: runs of one seed share held-out images, order
    of the batches and first weights, so that they may not be counted as independent.

    Attributes:
        pairs: number of seeds; difference: mean of theirs minus the base's, in points.
        bound: the mean lies below it with 95 % confidence (one-sided, Student's t).
        p: two-sided, of the paired t-test. Both are None for a single pair, and where all
            differences are equal but for rounding: the test says nothing there.
        ratio: mean error of the base over theirs.
    """

    pairs: int
    difference: float
    bound: float | None
    p: float | None
    ratio: float


def paired(mine: Sequence[Row], base: Sequence[Row]) -> Paired | None:
    """Of rows of one label against those of another, by seed, over the densities that both have of
    it; None without a pair. Raises ImportError without scipy.
    """
    theirs = {(row["density_asked"], row["seed"]): error_of(row) for row in base}
    by_seed: dict[int, list[tuple[float, float]]] = {}
    for row in mine:
        other = theirs.get((row["density_asked"], row["seed"]))
        if other is not None:
            by_seed.setdefault(row["seed"], []).append((error_of(row), other))
    if not by_seed:
        return None
    differences = [statistics.fmean(a - b for a, b in pairs) for pairs in by_seed.values()]
    from scipy.stats import ttest_1samp

    bound = p = None
    if max(differences) - min(differences) > _ROUNDING:
        p = float(ttest_1samp(differences, 0.0).pvalue)
        below = ttest_1samp(differences, 0.0, alternative="less").confidence_interval(0.95)
        bound = float(below.high)
    both = [pair for pairs in by_seed.values() for pair in pairs]
    totals = [statistics.fmean(errors) for errors in zip(*both, strict=True)]
    ratio = totals[1] / totals[0] if totals[0] else math.nan
    return Paired(len(by_seed), statistics.fmean(differences), bound, p, ratio)


def table(
    rows: Sequence[Row], against: str = "sparse-momentum", failed: Sequence[Row] = ()
) -> list[list[str]]:
    """Head and lines: a line per net, density and label; `against` is a label.

    failed: runs without a result. They count in no mean, and n tells how many they are.
    """
    head = ["net", "density", "method", "n", "test error in %", "training in s", "FLOPs density",
            f"error minus {against}", "p (paired t)"]  # fmt: skip
    lines, groups = [head], grouped(rows)
    for (net, density, name), members in groups.items():
        errors = [error_of(row) for row in members]
        seconds = [row["seconds"] for row in members]
        flops = statistics.fmean(row["flops_density"] for row in members)
        base = groups.get((net, density, against))
        lost = len(grouped(failed).get((net, density, name), ()))
        n = f"{len(members)} ({lost} failed)" if lost else str(len(members))
        test = None
        if base is not None and name != against:
            try:
                test = paired(members, base)
            except ImportError:
                head[-1] = "p (needs scipy)"
        ends = statistics.fmean(row["density"] for row in members)
        # Gradual pruning that came to no end, blocks that do not divide a layer.
        differs = abs(ends - density) > 0.01 * density
        shown = f"{100 * density:g} %" + (f" (ends at {100 * ends:.2f} %)" if differs else "")
        lines.append([net, shown, name, n, spread_of(errors, 2),
                      spread_of(seconds, 1), f"{100 * flops:.2f} %",
                      "" if test is None else f"{test.difference:+.2f} (n = {test.pairs})",
                      _or_empty(test and test.p, ".3g")])  # fmt: skip
    return lines


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; 0 for a single value, which has none to show."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def error_of(row: Row) -> float:
    """Test error in %."""
    return 100.0 * (1.0 - row["test_accuracy"])


def _or_empty(value: float | None, form: str, before: str = "") -> str:
    return "" if value is None else f"{before}{value:{form}}"


def spread_of(values: Sequence[float], digits: int) -> str:
    text = f"{statistics.fmean(values):.{digits}f}"
    if len(values) > 1:
        text += f" +- {standard_error(values):.{digits}f}"
    return text


def pooled(rows: Sequence[Row], against: str = "sparse-momentum") -> list[list[str]]:
    """Head and lines: `against` beside each other label of a net, over all densities and seeds that
    both have. Without lines where nothing can be compared, or without scipy.
    """
    head = ["net", "method", "seeds", f"error minus {against}", "95 % bound", "p (paired t)",
            f"error of {against} relative to it"]  # fmt: skip
    lines = [head]
    by_net: dict[str, dict[str, list[Row]]] = {}
    for row in sorted(rows, key=lambda r: (r["net"], label_of(r))):
        by_net.setdefault(row["net"], {}).setdefault(label_of(row), []).append(row)
    for net, labels in by_net.items():
        for name, members in labels.items():
            try:
                test = paired(members, labels.get(against, [])) if name != against else None
            except ImportError:
                return [head]
            if test is not None:
                lines.append([net, name, str(test.pairs), f"{test.difference:+.3f}",
                              _or_empty(test.bound, "+.3f", "< "), _or_empty(test.p, ".2g"),
                              f"{100 * (test.ratio - 1):+.1f} %"])  # fmt: skip
    return lines


def sensitivity(rows: Sequence[Row]) -> dict[str, dict[str, list[tuple[float, float, float]]]]:
    """By option, where it alone was varied over numbers: per net, density and method (value, mean
    test error in %, its standard error or 0), by value.
    """
    found: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for (net, density, _), members in grouped(rows).items():
        option, equals, text = members[0].get("variant", "").partition("=")
        try:
            value = float(text)
        except ValueError:
            continue
        if not equals:
            continue
        errors = [error_of(row) for row in members]
        spread = standard_error(errors)
        line = f"{members[0]['method']}, {net}, {100 * density:g} %"
        point = (value, statistics.fmean(errors), spread)
        found.setdefault(option, {}).setdefault(line, []).append(point)
    return {option: {k: sorted(v) for k, v in lines.items()} for option, lines in found.items()}
