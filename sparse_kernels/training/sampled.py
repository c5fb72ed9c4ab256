"""The growth signal "sampled": momentum of a random sample of the places, gathered in a window.

When a window opens, each layer draws a share of its free places, all alike probable, without
replacement. In the steps of the window the weight gradient is computed there (the operator that
computes it at the stored blocks), and its momentum gathered, as a dense optimizer would have it.
Neither a dense gradient nor a dense momentum is ever made. Growth ranks the sample and the blocks
just pruned; where more is to grow than was drawn, the rest is drawn at random. The next window
draws anew.

Some stored blocks are in the pattern too, as witnesses: their gradients are compared with
values.grad, which tells loss scaling and clipping (gradient_scale.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_kernels.pattern import SparsityPattern

from .blocks import BlockGrid
from .device import positions
from .rewrite import locate
from .rules import Candidates, block_means, grow_random
from .schedule import UpdateSchedule
from .scores import SampledScores
from .signals import GRADIENT, LayerSignal

WITNESSES = 1024
"""Stored blocks of a layer whose gradients are computed twice and compared."""


@dataclass(frozen=True)
class Sampling:
    """share: of the free places, in (0, 1]; generator: of the draw."""

    share: float
    generator: torch.Generator


class SampledSignal(LayerSignal):
    """A layer's signal over a sample. Buffers are [m, bh, bw], places int64 [m], ascending.

    free_at: int64, which of the places are the sample; the others are stored blocks. An optimizer
    without momentum has every stored block among them, and gathers one gradient.
    """

    places: Tensor | None = None
    free_at: Tensor | None = None
    _sampling: Sampling | None = None
    _witness: tuple[Tensor, Tensor] | None = None

    def arm(
        self, schedule: UpdateSchedule, next_step: int, sampling: Sampling | None = None
    ) -> None:
        self._sampling = sampling
        super().arm(schedule, next_step)

    def _make_probe(self) -> Tensor:
        if self.places is None:
            self._draw()
        assert self.places is not None
        rows_cols, block = self.layer.matrix_shape, self.layer.block
        parts = (self.layer.row_parts, self.layer.col_parts)
        pattern = SparsityPattern(
            rows_cols, block, *parts, capacity=self.places.numel(), device=self.places.device
        )
        pattern.rewrite_(self.places, check=False)
        probe: Tensor = self.layer.make_probe(pattern)
        return probe

    def _draw(self) -> None:
        if self._sampling is None:
            raise ValueError(
                f"layer {self.name!r}: the signal 'sampled' draws from a generator: expected "
                "arm(schedule, step, Sampling(share, generator))"
            )
        grid, stored = BlockGrid.of(self.layer), self.layer.pattern.keys()
        free = grid.blocks - stored.numel()
        count = min(free, math.ceil(self._sampling.share * free))
        everywhere = Candidates(self.name, stored, grid.blocks, None, self._sampling.generator)
        sample = grow_random(everywhere, count)
        # Evenly spaced: which ones does not matter.
        every = max(1, stored.numel() // WITNESSES) if self.view.family != "none" else 1
        self.places = torch.cat([stored[::every], sample]).sort().values
        self.free_at = torch.searchsorted(self.places, sample)

    def drawn(self) -> tuple[Tensor, Tensor] | None:
        if self.places is None or self.free_at is None:
            return None
        return self.places.cpu(), self.free_at.cpu()

    def take_drawn(self, drawn: tuple[Tensor, Tensor] | None) -> None:
        if drawn is None or self.places is None or self.free_at is None:
            return
        device = self.layer.values.device
        places, free_at = (part.to(device) for part in drawn)
        if torch.equal(places, self.places) and torch.equal(free_at, self.free_at):
            return  # of one checkpoint: what was gathered there goes on
        if self.gathered:
            raise RuntimeError(
                f"layer {self.name!r}: rank 0 has drawn another sample for this window than this "
                f"rank, which has gathered {self.gathered} steps of its own; expected the same on "
                "all ranks: load one checkpoint on every rank, and train no step before the model "
                "is wrapped in DistributedDataParallel"
            )
        self.disarm()
        self.places, self.free_at = places, free_at
        self._watch()

    def _blocks_of(self, dense: Tensor) -> Tensor:
        return dense

    def gradients(self) -> tuple[Tensor, Tensor]:
        """The waiting gradient and values.grad at the witnesses, float64 [n] each."""
        pattern = self.layer.pattern
        at, stored = self._witnesses(pattern)
        seen = self._compact(self.layer.values.grad, pattern).index_select(0, stored)
        raw = self.layer.probe.grad.index_select(0, at)
        return raw.reshape(-1).double(), seen.reshape(-1).double()

    def _witnesses(self, pattern: SparsityPattern) -> tuple[Tensor, Tensor]:
        """Where the witnesses are among the places and among the stored blocks, int64 [w] each."""
        if self._witness is None:
            assert self.places is not None and self.free_at is not None
            mask = torch.ones_like(self.places, dtype=torch.bool)
            mask.index_fill_(0, self.free_at, False)
            at = positions(mask, self.places.numel() - self.free_at.numel())
            self._witness = at, locate(pattern.keys(), self.places[at])[0]
        return self._witness

    # ---- at an update --------------------------------------------------------------------------

    def _active_momentum(self, pattern: Any, keys: Tensor, values: Tensor) -> Tensor:
        if GRADIENT in self.buffers:
            assert self.places is not None
            return self.buffers[GRADIENT][torch.searchsorted(self.places, keys)]
        return super()._active_momentum(pattern, keys, values)

    def complete(self, keys: Tensor) -> SampledScores:
        """Scores of the sample and of the stored blocks `keys`."""
        pattern, grid = self.layer.pattern, BlockGrid.of(self.layer)
        values = self._compact(self.layer.values.detach(), pattern)
        momentum = self._active_momentum(pattern, keys, values)
        if self.places is None or self.free_at is None or not self.buffers:
            places, blocks = keys, momentum
        else:
            found = {name: self.state(name, self.free_at) for name in self.buffers}
            sample = found[GRADIENT] if GRADIENT in found else self.view.momentum(found)
            places, order = torch.cat([keys, self.places[self.free_at]]).sort()
            blocks = torch.cat([momentum, sample.to(momentum.dtype)])[order]
        return SampledScores(places, block_means(blocks, grid.counts(places)))

    def grown_state(self, added: Tensor) -> dict[str, Tensor]:
        """Optimizer state of the added blocks: as gathered in the sample, else zero."""
        if self.free_at is None or not self.gathers_momentum or not self.view.has_state():
            return {}
        assert self.places is not None
        index, there = locate(self.places[self.free_at], added)
        if self.free_at.numel() == 0:
            return {}
        grown = {}
        for name in self.view.state_names:
            if name in self.buffers:
                state = self.state(name, self.free_at.index_select(0, index))
                grown[name] = torch.where(there[:, None, None], state, state.new_zeros(()))
        return grown

    def finish_update(self, schedule: UpdateSchedule, step: int) -> None:
        """Every window has a sample of its own."""
        del schedule, step
        self.since_update = 0
        self.disarm()

    def clear(self) -> None:
        super().clear()
        self.places = self.free_at = self._witness = None

    # ---- checkpoint ----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.places is not None and self.free_at is not None:
            state |= {"places": self.places.clone(), "free_at": self.free_at.clone()}
        return state

    def check_state(self, state: dict[str, Any]) -> None:
        super().check_state(state)
        if "places" not in state:
            return
        for name, keys, end in (
            ("places", state["places"], BlockGrid.of(self.layer).blocks),
            ("free_at", state["free_at"], state["places"].numel()),
        ):
            good = isinstance(keys, Tensor) and keys.dtype == torch.int64 and keys.dim() == 1
            if good and keys.numel():  # as it was drawn: ascending, in range
                good = int(keys[0]) >= 0 and int(keys[-1]) < end and bool((keys.diff() > 0).all())
            if not good:
                raise ValueError(
                    f"layer {self.name!r}: the sample's {name!r} must be ascending int64 below "
                    f"{end}; the checkpoint's is none"
                )

    def _buffer_shape(self, state: dict[str, Any]) -> tuple[int, int, int]:
        places = state.get("places")
        return (0 if places is None else places.numel(), *self.layer.block)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.disarm()
        super().load_state_dict(state)
        device = self.layer.values.device
        if "places" in state:
            self.places = state["places"].to(device, copy=True)
            self.free_at = state["free_at"].to(device, copy=True)
