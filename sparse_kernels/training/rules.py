"""The rules of sparse momentum as pure functions: importance, prune, redistribute, grow.

Tensors in, tensors out; equal inputs give equal results and ties go to the lowest index.
Everything counts *blocks*; with block (1, 1) a block is one weight. A user's own rule is a plain
callable of the signatures PruneRule, GrowthRule and RedistributionRule.

Source: Dettmers & Zettlemoyer 2019 (arXiv 1907.04840) and its official code, without that code's
drift of the total count; SET: Mocanu et al. 2018; gradient growth (RigL): Evci et al. 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .selection import largest_indices, select_smallest, select_smallest_of_each

FREE_SHARE = 0.99
"""A layer regrows at most this share of its free places (official code)."""
NEARLY_DENSE = 0.2
"""Below this sparsity the prune rate of an important layer is limited to the sparsity (official
code).
"""


@dataclass(frozen=True)
class LayerState:
    """One layer before an update. n = stored blocks, in ascending key order."""

    name: str
    keys: Tensor  # int64 [n], block_row * block_cols + block_col
    values: Tensor  # [n, bh, bw]
    momentum: Tensor  # [n, bh, bw], the optimizer's M at the stored blocks
    counts: Tensor  # int64 [n], matrix elements inside each block
    blocks: int  # blocks of the full matrix, stored or not
    block_cols: int = 0  # blocks of one block row; 0: not told

    @property
    def nnz(self) -> int:
        """Stored blocks."""
        return self.keys.numel()

    @property
    def sparsity(self) -> float:
        """Share of the blocks that is not stored."""
        return 1.0 - self.nnz / self.blocks

    def magnitudes(self) -> Tensor:
        """Mean |value| per stored block over its elements inside the matrix, [n]."""
        return block_means(self.values, self.counts)


@dataclass(frozen=True)
class Candidates:
    """Where one layer may grow: every block that is not in `kept`."""

    name: str
    kept: Tensor  # int64 [m], ascending keys that stay
    blocks: int  # blocks of the full matrix
    scores: Tensor | None  # [blocks]; >= 0 where free, -1 where kept; None without a dense signal
    generator: torch.Generator | None
    block_cols: int = 0  # blocks of one block row; 0: not told
    places: Tensor | None = None  # int64 [m], ascending: `scores` [m] are of these blocks only


PruneRule = Callable[[Sequence[LayerState], Sequence[int]], Sequence[Tensor]]
"""prune(layers, counts) -> per layer a bool tensor [n], True where a block goes. `counts` is what
each layer is asked to lose; the rule may spread sum(counts) otherwise over the layers."""
GrowthRule = Callable[[Candidates, int], Tensor]
"""grow(candidates, count) -> int64 [count] keys that are free, in any order, none twice."""
RedistributionRule = Callable[[Sequence[LayerState]], Tensor]
"""redistribute(layers) -> [layers] importance >= 0, in any unit (normalised by the caller)."""


def block_means(blocks: Tensor, counts: Tensor) -> Tensor:
    """Mean absolute value of each block, [n, bh, bw] and int64 [n] -> [n] (at least float32)."""
    magnitude = blocks.abs()
    if magnitude.dtype in (torch.float16, torch.bfloat16):
        magnitude = magnitude.float()
    if blocks.shape[1:] == (1, 1):
        return magnitude.reshape(-1)
    return magnitude.sum(dim=(1, 2)) / counts.to(magnitude.dtype)


def mean_magnitude(blocks: Tensor, counts: Tensor) -> Tensor:
    """Mean |.| over all elements inside the matrix, a float64 scalar tensor; 0 for an empty
    layer.
    """
    total = counts.sum().clamp(min=1)
    return blocks.abs().sum(dtype=torch.float64) / total


def normalise(importance: Tensor | Sequence[float], nnz: Sequence[int]) -> list[float]:
    """Shares that sum to 1. Empty layers get 0; if all importance is 0 the shares are those of nnz.

    importance: [layers], >= 0 and finite. Raises ValueError for a negative or non-finite entry.
    """
    if isinstance(importance, Tensor):
        importance = importance.to("cpu", torch.float64).tolist()
    raw = [float(x) for x in importance]
    if len(raw) != len(nnz):
        raise ValueError(
            f"one importance per layer expected: {len(nnz)} layers, got {len(raw)} numbers"
        )
    if any(not math.isfinite(x) or x < 0 for x in raw):
        raise ValueError(f"importance must be finite and >= 0 for every layer, got {raw}")
    raw = [x if n > 0 else 0.0 for x, n in zip(raw, nnz, strict=True)]
    largest = max(raw, default=0.0)
    # Dividing by the largest first keeps the sum of huge or denormal numbers finite and exact
    # enough.
    raw = [x / largest for x in raw] if largest > 0 else [float(n) for n in nnz]
    total = math.fsum(raw)
    return [x / total for x in raw] if total > 0 else [0.0] * len(raw)


def prune_counts(
    nnz: Sequence[int],
    blocks: Sequence[int],
    shares: Sequence[float],
    prune_rate: float,
    spare_dense: bool = True,
) -> list[int]:
    """Blocks that each layer loses: ceil(p * nnz).

    spare_dense: a layer with sparsity under 0.2 and a share above 1/layers is dense and still
    wanted: it prunes only min(sparsity, p). nnz, blocks: stored and all blocks per layer; shares:
    as from `normalise`.
    """
    counts = []
    for stored, total, share in zip(nnz, blocks, shares, strict=True):
        free = total - stored
        wanted = spare_dense and free / total < NEARLY_DENSE and share > 1.0 / len(nnz)
        if wanted and free / total < prune_rate:
            counts.append(-(-free * stored // total))  # whole numbers: no rounding up of 6.000001
        else:
            counts.append(min(stored, math.ceil(prune_rate * stored)))
    return counts


def redistribute(
    total: int, shares: Sequence[float], free: Sequence[int], cap: float = FREE_SHARE
) -> list[int]:
    """Integer regrowth per layer that sums to exactly `total`.

    Layer l wants shares[l] * total and takes at most floor(cap * free[l]); what overflows is added
    in equal parts to the other layers, repeatedly (the fixed point of the official code's loop,
    found directly as a water level). If the caps leave too little room they are relaxed to all
    free places. Fractions go to the largest remainder, ties to the lowest layer.

    free: places per layer that are free after pruning. Raises ValueError if sum(free) < total.
    """
    if total > sum(free):
        raise ValueError(f"cannot place {total} blocks in {sum(free)} free places")
    caps = [math.floor(cap * f) for f in free]
    if sum(caps) < total:
        caps = list(free)
    wanted = _water_fill([s * total for s in shares], caps, total)
    counts = [min(c, math.floor(w)) for w, c in zip(wanted, caps, strict=True)]
    order = sorted(range(len(counts)), key=lambda i: (counts[i] - wanted[i], i))
    missing = total - sum(counts)
    while missing != 0:  # one round suffices but for rounding of the water level itself
        for i in order if missing > 0 else reversed(order):
            change = (missing > 0 and counts[i] < caps[i]) - (missing < 0 < counts[i])
            counts[i] += change
            missing -= change
            if missing == 0:
                break
    return counts


def _water_fill(wanted: Sequence[float], caps: Sequence[int], total: int) -> list[float]:
    """min(cap, wanted + level) with the level >= 0 at which the sum is `total`."""
    level = 0.0
    for _ in range(len(caps) + 1):
        filled = [min(float(c), w + level) for w, c in zip(wanted, caps, strict=True)]
        open_layers = sum(w + level < c for w, c in zip(wanted, caps, strict=True))
        excess = total - math.fsum(filled)
        if open_layers == 0 or excess <= 0:
            break
        level += excess / open_layers
    return [min(float(c), w + level) for w, c in zip(wanted, caps, strict=True)]


# ---- prune rules -------------------------------------------------------------------------------


def prune_magnitude(layers: Sequence[LayerState], counts: Sequence[int]) -> list[Tensor]:
    """The counts[l] blocks of smallest mean |value| of each layer."""
    return select_smallest_of_each([s.magnitudes() for s in layers], counts)


def prune_global_magnitude(layers: Sequence[LayerState], counts: Sequence[int]) -> list[Tensor]:
    """The sum(counts) blocks of smallest mean |value| over all layers; ties to the first layer.

    The largest of each layer goes last of all: an emptied layer passes nothing on, and where
    survivors decide what grows it would stay empty.
    """
    scores = [_largest_last(s.magnitudes()) for s in layers]
    chosen = select_smallest(torch.cat(scores), sum(counts))
    return list(chosen.split([s.numel() for s in scores]))


def _largest_last(scores: Tensor) -> Tensor:
    if scores.numel() == 0:
        return scores
    return scores.index_fill(0, scores.argmax().reshape(1), math.inf)


def prune_set(layers: Sequence[LayerState], counts: Sequence[int]) -> list[Tensor]:
    """SET: of the positive weights the smallest, of the negative ones the largest (nearest to
    zero).

    Both signs lose the same fraction; the count is split by largest remainder. A block has the
    sign of its sum, and a zero counts as positive.
    """
    return [_prune_set_layer(s, k) for s, k in zip(layers, counts, strict=True)]


def _prune_set_layer(layer: LayerState, count: int) -> Tensor:
    negative = layer.values.sum(dim=(1, 2)) < 0
    number = int(negative.sum())
    lost_negative = redistribute(
        count,
        [1.0 - number / max(1, layer.nnz), number / max(1, layer.nnz)],
        [layer.nnz - number, number],
        cap=1.0,
    )[1]
    scores = layer.magnitudes()
    pruned = torch.zeros_like(negative)
    pruned[negative] = select_smallest(scores[negative], lost_negative)
    pruned[~negative] = select_smallest(scores[~negative], count - lost_negative)
    return pruned


# ---- growth rules ------------------------------------------------------------------------------


def grow_largest(candidates: Candidates, count: int) -> Tensor:
    """Free blocks of largest mean |signal|; places without any signal follow in order of their
    key. Of a sample: its largest, and where it has too few, others drawn at random.
    """
    if candidates.scores is None:
        raise ValueError(
            f"layer {candidates.name}: growth by signal needs a dense signal (exact, window or "
            "gradient), but the signal is 'random'; pass growth='random' or another signal"
        )
    if candidates.places is None:
        return largest_indices(candidates.scores, count)
    # Every kept block is among the places, so that the host knows how many of them are free.
    known = min(count, candidates.places.numel() - candidates.kept.numel())
    best = candidates.places[largest_indices(candidates.scores, known)]
    if known == count:
        return best
    taken = torch.cat([candidates.kept, best]).sort().values
    rest = replace(candidates, kept=taken, scores=None, places=None)
    return torch.cat([best, grow_random(rest, count - known)])


def grow_random(candidates: Candidates, count: int) -> Tensor:
    """`count` free blocks drawn uniformly without replacement from the candidates' generator.

    Memory is proportional to count and to the stored blocks, not to the matrix.
    """
    free = candidates.blocks - candidates.kept.numel()
    drawn = _draw_distinct(free, count, candidates.generator)
    # Pageable memory has been read when the call returns; a blocking copy would wait for the GPU.
    ranks = drawn.to(candidates.kept.device, non_blocking=True)
    # kept[i] - i free places lie before kept key i, so rank r lies after the i with kept[i] - i <=
    # r.
    before = candidates.kept - torch.arange(candidates.kept.numel(), device=candidates.kept.device)
    return ranks + torch.searchsorted(before, ranks, right=True)


def _draw_distinct(population: int, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` distinct integers in [0, population), int64, ascending."""
    device = generator.device if generator is not None else torch.device("cpu")
    if 2 * count > population:
        return torch.randperm(population, generator=generator, device=device)[:count].sort().values
    drawn = torch.empty(0, dtype=torch.int64, device=device)
    while drawn.numel() < count:
        more = torch.randint(
            population, (count + count // 4 + 16,), generator=generator, device=device
        )
        drawn = torch.cat([drawn, more]).unique()
    keep = torch.randperm(drawn.numel(), generator=generator, device=device)[:count]
    return drawn[keep].sort().values


# ---- redistribution rules ----------------------------------------------------------------------


def importance_momentum(layers: Sequence[LayerState]) -> Tensor:
    """Mean |M| over the stored weights of each layer, float64 [layers]."""
    return torch.stack([mean_magnitude(s.momentum, s.counts) for s in layers])


def importance_magnitude(layers: Sequence[LayerState]) -> Tensor:
    """Mean |value| over the stored weights of each layer, float64 [layers]."""
    return torch.stack([mean_magnitude(s.values, s.counts) for s in layers])


def importance_nonzero(layers: Sequence[LayerState]) -> Tensor:
    """Number of blocks of each layer before pruning, float64 [layers]: the official code's mode."""
    return torch.tensor([float(s.nnz) for s in layers], dtype=torch.float64)


def importance_survivors(layers: Sequence[LayerState]) -> Tensor:
    """What pruning has left decides regrowth, as in DSR: by name or as this very function, for a
    rule sees the layers before pruning. Called, it is importance_nonzero.
    """
    return importance_nonzero(layers)


PRUNE_RULES: dict[str, PruneRule] = {
    "magnitude": prune_magnitude,
    "set": prune_set,
    "global_magnitude": prune_global_magnitude,
}
"""Names; config.py adds "fan_in" and "groups:M", structured.py growth "neuron"."""
GROWTH_RULES: dict[str, GrowthRule] = {
    "momentum": grow_largest,
    "gradient": grow_largest,
    "random": grow_random,
}
REDISTRIBUTION_RULES: dict[str, RedistributionRule | None] = {
    "momentum": importance_momentum,
    "magnitude": importance_magnitude,
    "nonzero": importance_nonzero,
    "survivors": importance_survivors,
    "none": None,
}
