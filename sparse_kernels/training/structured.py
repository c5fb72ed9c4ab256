"""Rules that place weights within groups: constant fan-in, N:M, and growth by neuron.

A group is a row of the weight matrix (all inputs of one output: constant fan-in) or ``size``
neighbouring places of a row (N:M: N weights in each M places). Rules here level the groups: what
goes leaves the fullest groups first, what comes enters the emptiest first, and among places that
are alike in this the weight, or the signal, decides. So a pattern whose groups differ by at most
one block (`arrange` makes it) stays so, with exactly N where the total is N per group; any other
comes nearer to it with each update, as far as the prune rate reaches.

Sources: constant fan-in: SRigL, Lasby et al. 2023 (arXiv 2305.02299); N:M: Mishra et al. 2021
(arXiv 2104.08378), Zhou et al. 2021 (arXiv 2102.04010); growth by neuron: the mode
"momentum_neuron" of the official code of Dettmers & Zettlemoyer 2019. The levelling is this
project's way to write the three as one rule.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import BlockGrid
from .layers import sparse_layers
from .rewrite import COMPRESSED, added_mask, rewrite
from .rules import GROWTH_RULES, Candidates, LayerState, redistribute

_GROUPS = re.compile(r"groups:([1-9]\d*)")


@dataclass(frozen=True)
class PruneInGroups:
    """Prune rule: the smallest of the fullest groups. size: places per group, None: a whole row."""

    size: int | None = None

    def __call__(self, layers: Sequence[LayerState], counts: Sequence[int]) -> list[Tensor]:
        """Bool [n] per layer with counts[l] set."""
        return [self._prune(layer, k) for layer, k in zip(layers, counts, strict=True)]

    def _prune(self, layer: LayerState, count: int) -> Tensor:
        scores = layer.magnitudes()
        group, groups = group_of(layer.keys, layer.block_cols, layer.blocks, self.size, layer.name)
        # The last of a group to go is its largest: what stays beside it is its place from the end.
        fill = torch.bincount(group, minlength=groups)
        place = fill[group] - rank_in_group(group, scores)
        order = scores.argsort(stable=True)
        order = order[place[order].argsort(descending=True, stable=True)]
        pruned = torch.zeros_like(scores, dtype=torch.bool)
        pruned[order[:count]] = True
        return pruned


@dataclass(frozen=True)
class GrowInGroups:
    """Growth rule: the largest signal in the emptiest groups, or at random where there is none.

    size: places per group, None: a whole row. Memory grows with the matrix.
    """

    size: int | None = None

    def __call__(self, candidates: Candidates, count: int) -> Tensor:
        """Int64 [count] free keys, ascending."""
        free, scores = _free_places(candidates)
        if scores is None:
            source = candidates.generator
            device = torch.device("cpu") if source is None else source.device
            drawn = torch.rand(free.numel(), generator=source, device=device, dtype=torch.float64)
            scores = drawn.to(free.device)
        cols, blocks, name = candidates.block_cols, candidates.blocks, candidates.name
        group, groups = group_of(free, cols, blocks, self.size, name)
        kept, _ = group_of(candidates.kept, cols, blocks, self.size, name)
        level = torch.bincount(kept, minlength=groups)[group] + rank_in_group(group, -scores)
        order = (-scores).argsort(stable=True)
        order = order[level[order].argsort(stable=True)]
        return free[order[:count]].sort().values


def grow_neurons(candidates: Candidates, count: int) -> Tensor:
    """Rows share the growth by the mean signal of their free places; each takes its largest.

    Int64 [count] free keys, ascending. Raises ValueError without a dense signal. The official
    code's mean includes the stored places; a growth rule sees the free ones.
    """
    free, scores = _free_places(candidates)
    if scores is None:
        raise ValueError(
            f"layer {candidates.name}: growth='neuron' ranks rows by a dense signal, but the "
            "signal is 'random'; choose 'exact', 'window' or 'gradient'"
        )
    row, rows = group_of(free, candidates.block_cols, candidates.blocks, None, candidates.name)
    room = torch.bincount(row, minlength=rows)
    sums = torch.zeros(rows, dtype=torch.float64, device=free.device)
    means = sums.index_add_(0, row, scores.double()) / room.clamp(min=1)
    total = float(means.sum())
    shares = (means / total if total > 0 else room / max(1, free.numel())).tolist()
    allowed = torch.tensor(redistribute(count, shares, room.tolist(), cap=1.0), device=free.device)
    return free[rank_in_group(row, -scores) < allowed[row]]


GROWTH_RULES["neuron"] = grow_neurons


def group_of(
    keys: Tensor, block_cols: int, blocks: int, size: int | None, name: str
) -> tuple[Tensor, int]:
    """Group of every key, int64 [n], and the number of groups; the last of a row may be smaller.

    Raises ValueError if the number of columns was not told (block_cols 0).
    """
    if block_cols < 1:
        raise ValueError(
            f"layer {name}: rules within rows or groups need block_cols, the blocks of one row; "
            "give it to LayerState and Candidates"
        )
    width = block_cols if size is None else min(size, block_cols)
    per_row = -(-block_cols // width)
    row = torch.div(keys, block_cols, rounding_mode="floor")
    place = torch.div(keys - row * block_cols, width, rounding_mode="floor")
    return row * per_row + place, blocks // block_cols * per_row


def rank_in_group(group: Tensor, scores: Tensor) -> Tensor:
    """Place of every entry among its group by ascending score, from 0; ties by index. int64 [n]."""
    order = scores.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    sorted_group = group[order]
    first = torch.searchsorted(sorted_group, sorted_group)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device) - first
    return rank


def _free_places(candidates: Candidates) -> tuple[Tensor, Tensor | None]:
    free = torch.ones(candidates.blocks, dtype=torch.bool, device=candidates.kept.device)
    free[candidates.kept] = False
    places = free.nonzero().reshape(-1)
    scores = candidates.scores
    return places, None if scores is None else scores[places]


def group_size(name: str) -> int | None:
    """The M of "groups:M", None for "fan_in". Raises ValueError for any other name."""
    if name == "fan_in":
        return None
    found = _GROUPS.fullmatch(name)
    if found is None:
        raise ValueError(f"expected 'fan_in' or 'groups:M' with M >= 1, got {name!r}")
    return int(found[1])


def is_structured(name: Any) -> bool:
    """Whether `name` is "fan_in" or "groups:M"."""
    return isinstance(name, str) and (name == "fan_in" or _GROUPS.fullmatch(name) is not None)


@torch.no_grad()
def arrange(model: nn.Module, rule: str, generator: torch.Generator | None = None) -> None:
    """Give a new model's sparse layers, in place, random patterns with level groups.

    rule: "fan_in" or "groups:M". Numbers of blocks stay. Weights that lose their place are given
    to the new places: all are drawn alike, so that which goes where does not matter; of trained
    weights it would. Call it before the optimizer is made.
    """
    grow = GrowInGroups(group_size(rule))
    for name, layer in sparse_layers(model):
        old, grid = layer.pattern.keys(), BlockGrid.of(layer)
        none = old[:0]
        places = Candidates(name, none, grid.blocks, None, generator, grid.block_cols)
        new = grow(places, old.numel())
        freed = layer.pattern.compress(layer.dense_matrix())[: old.numel()][added_mask(new, old)]
        rewrite(layer, None, new, {"values": freed})
        if grid.has_partial_blocks and layer.storage == COMPRESSED:
            inside = layer.pattern.compress(layer.pattern.expand(layer.values.detach()))
            layer.values[: new.numel()] = inside[: new.numel()]  # zero outside the matrix
