"""Mask updates on a device whose work is queued: sizes that the host knows, no waiting for numbers.

On a GPU every number that Python reads (``int(tensor)``, ``nonzero``, a boolean index) waits until
the queue is empty.  An update needs few: the importance of each layer and whether all is finite.
They are read in one copy (``read_numbers``); from them the host works out how many blocks each
layer loses and grows, so that every tensor after that has a size known beforehand.

On the CPU reading is free and shorter ways exist (lists instead of prefix sums), so those stay.
Both give equal bits: tests/test_device_update.py, test_device_reads.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sparse_kernels.pattern import SparsityPattern


def queued(tensor: Tensor) -> bool:
    """Whether the host waits when it reads a number of ``tensor``."""
    return tensor.device.type != "cpu"


def read_numbers(parts: Sequence[Tensor]) -> list[list[float]]:
    """The numbers of some float tensors [n_i], each as a list: one copy to the host for all.

    Those on the CPU are read where they are: a copy to a GPU waits for it, too.
    """
    waiting = [part.reshape(-1) for part in parts if queued(part)]
    numbers: list[float] = []
    if waiting:
        where = waiting[0].device
        numbers = _to_host(torch.cat([part.to(where, torch.float64) for part in waiting]))
    found, at = [], 0
    for part in parts:
        if queued(part):
            found.append(numbers[at : at + part.numel()])
            at += part.numel()
        else:
            found.append(part.reshape(-1).tolist())
    return found


def _to_host(flat: Tensor) -> list[float]:
    """The one place of an update where the host waits (tests count its calls)."""
    numbers: list[float] = flat.tolist()
    return numbers


def positions(mask: Tensor, count: int) -> Tensor:
    """int64 [count], ascending: where ``mask`` (bool [n]) is set; exactly ``count`` places are.

    The k-th is where the running number of set places reaches k.
    """
    running = mask.cumsum(0, dtype=torch.int32)
    wanted = torch.arange(1, count + 1, dtype=torch.int32, device=mask.device)
    return torch.searchsorted(running, wanted)


def smallest(scores: Tensor, count: int) -> Tensor:
    """Bool [n] with ``count`` (0 < count < n) of the smallest set; ties to the lowest index."""
    threshold = torch.topk(scores, count, largest=False, sorted=False).values.amax()
    return _with_ties(scores < threshold, scores == threshold, count)


def largest(scores: Tensor, count: int) -> Tensor:
    """int64 [count] (0 < count < n), ascending places of the largest; ties to the lowest index."""
    threshold = torch.topk(scores, count, sorted=False).values.amin()
    return positions(_with_ties(scores > threshold, scores == threshold, count), count)


def _with_ties(sure: Tensor, tied: Tensor, count: int) -> Tensor:
    """``sure`` and the first of ``tied``, so that exactly ``count`` are set."""
    missing = count - sure.sum()
    return sure | (tied & (tied.cumsum(0, dtype=torch.int32) <= missing))


def count_elements(patterns: Iterable[SparsityPattern]) -> None:
    """Let every pattern know its ``nnz``: one copy for all whose blocks are partial, else none."""
    unknown = [p for p in patterns if p._nnz is None and p.has_partial_blocks]
    if not unknown:
        return
    where = unknown[0].device
    sums = torch.stack([p.element_counts().sum().to(where) for p in unknown])
    for pattern, number in zip(unknown, _to_host(sums), strict=True):
        pattern._nnz = int(number)
