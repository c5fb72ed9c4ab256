"""What a growth signal says of a layer: a number per place, or of a sample of the places."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .rules import Candidates, GrowthRule, LayerState, grow_largest


class SampledScores(NamedTuple):
    """Scores of some places. Every stored block is among them."""

    places: Tensor  # int64 [m], ascending block keys
    scores: Tensor  # [m], >= 0


Scores = Tensor | SampledScores | None
"""Of all blocks ([blocks] >= 0), of some, or of none."""


def numbers(found: Scores) -> Tensor | None:
    """The scores alone."""
    return found.scores if isinstance(found, SampledScores) else found


def candidates(
    state: LayerState,
    kept: Tensor,
    found: Scores,
    growth: GrowthRule,
    generator: torch.Generator | None,
) -> Candidates:
    """Where `growth` may grow beside the blocks `kept`; writes -1 into the scores of those.

    `grow_largest` knows what a sample is. Any other rule is given a score for each block, 0 where
    there is none: one such vector at a time.
    """
    places: Tensor | None = None
    scores = numbers(found)
    if isinstance(found, SampledScores):
        if growth is grow_largest:
            places = found.places
        else:
            full = found.scores.new_zeros(state.blocks)
            scores = full.index_copy_(0, found.places, found.scores)
    if scores is not None:
        at = kept if places is None else torch.searchsorted(places, kept)
        scores.index_fill_(0, at, -1.0)
    return Candidates(state.name, kept, state.blocks, scores, generator, state.block_cols, places)
