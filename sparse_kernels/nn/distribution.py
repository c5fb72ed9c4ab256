"""How many blocks each layer keeps: uniform or Erdos-Renyi-kernel densities, with exact totals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class LayerSize(NamedTuple):
    """What a distribution needs to know of a layer: its weight's shape (torch's) and its blocks."""

    shape: tuple[int, ...]
    blocks: int


def uniform_counts(layers: Sequence[LayerSize], density: float) -> list[int]:
    """Blocks to keep per layer: ``round(density * blocks)`` of each, at least 1."""
    return [max(1, round(density * layer.blocks)) for layer in layers]


def erk_densities(layers: Sequence[LayerSize], density: float) -> list[float]:
    """Erdos-Renyi-kernel densities, capped at 1, whose blocks sum to ``density`` of all blocks.

    A layer's density is proportional to (sum of the weight's dimensions) / (product of them), so
    that small layers stay denser.  Where that exceeds 1 the layer is dense and the others share
    the rest.  Source: RigL (Evci et al. 2020, arXiv 1911.11134), after SET (Mocanu et al. 2018).
    """
    raw = [sum(layer.shape) / _product(layer.shape) for layer in layers]
    budget = density * sum(layer.blocks for layer in layers)
    dense: set[int] = set()
    while True:
        free = [i for i in range(len(layers)) if i not in dense]
        if not free:
            return [1.0] * len(layers)
        left = budget - sum(layers[i].blocks for i in dense)
        scale = left / sum(raw[i] * layers[i].blocks for i in free)
        full = [i for i in free if scale * raw[i] > 1]
        if not full:
            return [1.0 if i in dense else scale * raw[i] for i in range(len(layers))]
        dense.update(full)


def erk_counts(layers: Sequence[LayerSize], density: float) -> list[int]:
    """Blocks to keep per layer by ``erk_densities``; they sum to ``round(density * all blocks)``.

    Fractions go to the layers with the largest remainders (ties: the first layer).  Every layer
    keeps at least one block, so the sum is never below the number of layers.
    """
    wanted = [
        fraction * layer.blocks
        for fraction, layer in zip(erk_densities(layers, density), layers, strict=True)
    ]
    counts = [max(1, min(layer.blocks, int(w))) for w, layer in zip(wanted, layers, strict=True)]
    total = max(len(layers), round(density * sum(layer.blocks for layer in layers)))
    while (missing := total - sum(counts)) != 0:
        step = 1 if missing > 0 else -1
        lacking = [step * (w - c) for w, c in zip(wanted, counts, strict=True)]
        order = sorted(range(len(layers)), key=lambda i: -lacking[i])
        movable = [i for i in order if 1 <= counts[i] + step <= layers[i].blocks]
        for i in movable[: abs(missing)]:
            counts[i] += step
    return counts


def _product(shape: Sequence[int]) -> int:
    result = 1
    for side in shape:
        result *= side
    return result
