"""From the probe's gradient to the one that the optimizer uses: loss scaling, clipping by norm.

The factor is found by least squares between the dense gradient at the stored blocks and
`values.grad`, ONE factor per param group of the optimizer over all its layers: the true gradient of
a single layer may be nothing but rounding (a weight row before BatchNorm is free to scale, so a row
with one weight has gradient 0), and two roundings are no multiples of each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .signals import LayerSignal

SCALE_SNAP = 1e-4
"""A gradient scale this close to 1 is rounding of two kernels, not clipping."""
SCALE_MISMATCH = 0.1
"""Largest relative distance between values.grad and scale * dense gradient, over a param group,
that is taken as rounding.
"""


def gather(signals: Sequence[LayerSignal], scale: float | None, extra: float = 1.0) -> None:
    """Let every signal take the dense gradient of this step, as the optimizer sees it.

    scale: factor from the probe's gradient to the optimizer's; None compares with values.grad.
    extra: a further factor (a fused optimizer unscales inside its step).
    Raises RuntimeError if values.grad is no multiple of the dense gradient over a param group.
    """
    waiting = [signal for signal in signals if signal.pending() is not None]
    if not waiting:
        return
    scales = {} if scale is not None else group_scales(waiting)
    for signal in waiting:
        factor = scales[signal.view.group_index] if scale is None else scale
        signal.observe(extra * factor)


def group_scales(signals: Sequence[LayerSignal]) -> dict[int, float]:
    """Factor per index of a param group, for signals with a waiting gradient (one host sync)."""
    return scales_of(signals, [signal.comparison() for signal in signals])


def scales_of(signals: Sequence[LayerSignal], sums: Sequence[Tensor]) -> dict[int, float]:
    """Factor per index of a param group from the sums of LayerSignal.comparison, [3] each."""
    rows = torch.stack([s.to(sums[0].device) for s in sums]).tolist()
    groups: dict[int, list[tuple[LayerSignal, list[float]]]] = {}
    for signal, row in zip(signals, rows, strict=True):
        groups.setdefault(signal.view.group_index, []).append((signal, row))
    return {index: _group_scale(members) for index, members in groups.items()}


def _group_scale(members: Sequence[tuple[LayerSignal, list[float]]]) -> float:
    square, product, seen = (sum(row[i] for _, row in members) for i in range(3))
    if square == 0.0 or not math.isfinite(square + seen):  # the update's check names the layer
        return 1.0
    if seen == 0.0:
        return 0.0
    factor = product / square
    missed = max(0.0, 1.0 - product * product / (square * seen)) ** 0.5
    if missed > SCALE_MISMATCH:

        def distance(member: tuple[LayerSignal, list[float]]) -> float:
            s, p, v = member[1]
            return v - 2 * factor * p + factor * factor * s

        raise RuntimeError(
            f"layer {max(members, key=distance)[0].name!r}: values.grad is not a multiple of the "
            f"dense weight gradient (relative distance {missed:.2g} over its param group); "
            "something changed it element by element, layer by layer or averaged it over ranks "
            "(clip_grad_value_, a hook, an all_reduce of your own), which the growth signal cannot "
            "follow. Use DistributedDataParallel for several ranks, clip_grad_norm_, give layers "
            "with a scale of their own a param group of their own, use signal='random', or pass "
            "grad_scale=1.0 to SparseMomentum to take the dense gradient as it is"
        )
    return 1.0 if abs(factor - 1.0) <= SCALE_SNAP else factor
