"""Exact selection of the smallest or largest scores; ties go to the lowest index."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_kernels.backends import cuda_pattern

from . import device

_LONG = 1 << 16
"""From this many scores on, a few of the largest are looked for in a shortlist."""
_SAMPLE = 1 << 14
_FEW = 8
"""At most 1 / _FEW of the scores count as a few."""


def _fill_ties(sure: Tensor, tied: Tensor, count: int) -> Tensor:
    """`sure` and the first of `tied`, so that exactly `count` are set."""
    # Nearly always one tie: far cheaper to list than to count through.
    places = tied.nonzero().reshape(-1)[: count - int(torch.count_nonzero(sure))]
    return sure.index_fill_(0, places, True)


def select_smallest(scores: Tensor, count: int) -> Tensor:
    """Bool [n] with exactly `count` of the smallest `scores` ([n], no NaN); ties to the lowest
    index.

    Raises ValueError unless 0 <= count <= n.
    """
    _check_count(scores, count)
    if count in (0, scores.numel()):
        return torch.full_like(scores, bool(count), dtype=torch.bool)
    if cuda_pattern.takes_scores([scores]):
        return cuda_pattern.select_mask([scores], [count], largest=False)[0]
    if device.queued(scores):
        return device.smallest(scores, count)
    threshold = torch.kthvalue(scores, count).values
    return _fill_ties(scores < threshold, scores == threshold, count)


def select_smallest_of_each(scores: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """`select_smallest` in every layer; on a GPU in a few launches for all of them."""
    for found, count in zip(scores, counts, strict=True):
        _check_count(found, count)
    if cuda_pattern.takes_scores(scores):
        return cuda_pattern.select_mask(scores, counts, largest=False)
    return [select_smallest(found, count) for found, count in zip(scores, counts, strict=True)]


def _check_count(scores: Tensor, count: int) -> None:
    if not 0 <= count <= scores.numel():
        raise ValueError(
            f"cannot select {count} of {scores.numel()} scores; count must be in [0, n]"
        )


def largest_indices(scores: Tensor, count: int) -> Tensor:
    """int64 [count], ascending: places of the `count` largest `scores` ([n], no NaN); ties to the
    lowest index.

    Raises ValueError unless 0 <= count <= n.

    Of long `scores` a regular sample gives a bound that nearly always lets some more than `count`
    through (the idea of Floyd and Rivest 1975); those alone are then selected from. Where it lets
    fewer through, all are.
    """
    _check_count(scores, count)
    if count in (0, scores.numel()):
        return torch.arange(count, device=scores.device)
    if cuda_pattern.takes_scores([scores]):
        return cuda_pattern.select_places([scores], [count], largest=True)[0]
    if device.queued(scores):
        return device.largest(scores, count)
    places = _shortlist(scores, count)
    listed = scores if places is None else scores[places]
    threshold = torch.kthvalue(listed, listed.numel() - count + 1).values
    chosen = (listed >= threshold).nonzero().reshape(-1)
    excess = chosen.numel() - count
    if excess:
        tied = (listed[chosen] == threshold).nonzero().reshape(-1)
        wanted = torch.ones_like(chosen, dtype=torch.bool)
        wanted[tied[-excess:]] = False
        chosen = chosen[wanted]
    return chosen if places is None else places[chosen]


def _shortlist(scores: Tensor, count: int) -> Tensor | None:
    """int64 [>= count], ascending: every place whose score reaches some bound; None for all."""
    total = scores.numel()
    if total < _LONG or count * _FEW > total:
        return None
    # An odd stride: of a matrix with an even number of columns it visits all of them.
    sample = scores[:: (total // _SAMPLE) | 1]
    expected = count * sample.numel() / total
    rank = round(expected + 6 * expected**0.5) + 8  # six standard deviations on the safe side
    if rank >= sample.numel():
        return None
    bound = torch.kthvalue(sample, sample.numel() - rank + 1).values
    places = (scores >= bound).nonzero().reshape(-1)
    return places if places.numel() >= count else None
