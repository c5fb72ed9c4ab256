"""Growth signals and mask updates on the ranks of a job under DistributedDataParallel.

DDP averages the gradients of `values`, so weights and optimizer states are equal on all ranks.
Dense gradients stay where they are formed: each rank gathers those of its own batch.  Momentum is
linear in the gradient, so the average of the gathered momenta is the momentum of the averaged
gradient, and one reduction before a mask update is enough.  (Adam's second moment is not linear:
there the dense gradient of each step of the window is reduced.)

The factor of clipping and loss scaling (gradient_scale.py) compares the dense gradient with
`values.grad`, which DDP has averaged.  The dense one is averaged as a sketch: SKETCH sums of the
stored blocks' entries with fixed random signs, which keep products of vectors within a few percent
(Charikar, Chen and Farach-Colton 2002), and a factor between multiples exactly.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import data_parallel
from .config import SparseMomentumConfig
from .data_parallel import Attachment
from .gradient_scale import gather, scales_of
from .limits import Limits
from .rewrite import added_mask
from .rules import LayerState
from .signals import LayerSignal
from .update import LayerChange

logger = logging.getLogger(__name__)

SKETCH = 256
"""Sums per layer that stand for its gradient when ranks compare."""


class RankAgreement:
    """What the ranks of a job have in common for a SparseMomentum: generator, costs, growth
    signals, masks; for a single process everything is local.

    model: as given to SparseMomentum.  A DistributedDataParallel is attached at once; a model that
    is wrapped elsewhere, when its first forward pass under DDP shows it.
    """

    def __init__(
        self, model: nn.Module, signals: Sequence[LayerSignal], generator: torch.Generator
    ) -> None:
        self._signals = signals
        self._generator = generator
        self._signs = torch.empty(0)
        self.attachment: Attachment | None = None
        self.gathered = False  # since the last reduction
        self._limits: Limits | None = None
        self._watch: Any = None
        if data_parallel.is_ddp(model):
            self._join(model)
        elif data_parallel.several_ranks():
            self._watch = signals[0].layer.register_forward_pre_hook(_weak_look(self))

    @property
    def several(self) -> bool:
        """Whether there are other ranks."""
        return self.attachment is not None and self.attachment.world > 1

    def limits(self, config: SparseMomentumConfig, cost: Mapping[str, float] | None) -> Limits:
        """Limits of which every rank has the same costs: rank 0's, since they may be measured.

        Where DistributedDataParallel is not known yet, they become so when it is joined. Raises
        ValueError as Limits does; on the other ranks RuntimeError if rank 0's cannot be sent.
        """
        if self.attachment is not None:
            own = cost
            cost = self.attachment.on_rank_0(lambda: None if own is None else _numbers(own))
        self._limits = Limits(config, self._signals, cost)
        return self._limits

    def remove(self) -> None:
        """Take the hook off that looks for a DistributedDataParallel."""
        if self._watch is not None:
            self._watch.remove()
            self._watch = None

    def _look(self) -> None:
        """In a forward pass: join the DistributedDataParallel around it, if there is one."""
        ddp = data_parallel.active_ddp()
        if ddp is not None:
            self.remove()
            self._join(ddp)

    def _join(self, ddp: nn.Module) -> None:
        attachment = data_parallel.attachment(ddp)
        inside = {layer for _, layer in attachment.layers()}
        outside = [signal.name for signal in self._signals if signal.layer not in inside]
        if outside:
            raise ValueError(
                f"layers {', '.join(map(repr, outside))} are not inside of the "
                "DistributedDataParallel that the others are in, so that their gradients are not "
                "averaged; wrap the whole model, or make a SparseMomentum for each part"
            )
        self.attachment = attachment
        # Ranks seeded apart would grow apart: rank 0's draws are everybody's, those made included.
        state: list[Any] = [
            self._generator.get_state(),
            [signal.drawn() for signal in self._signals],
            {} if self._limits is None else self._limits.costs,
        ]
        torch.distributed.broadcast_object_list(state, group=attachment.group, group_src=0)
        self._generator.set_state(state[0])
        attachment.everywhere(lambda: self._take_drawn(state[1]))
        if self._limits is not None:
            self._limits.take_costs(state[2])

    def _take_drawn(self, samples: Sequence[Any]) -> None:
        for signal, drawn in zip(self._signals, samples, strict=True):
            signal.take_drawn(drawn)

    # ---- every step ----------------------------------------------------------------------------

    def gather(self, scale: float | None, extra: float) -> None:
        """gradient_scale.gather over all ranks: every signal takes this step's dense gradient.

        Communicates, outside of Adam's windows, SKETCH numbers per layer, and only inside of the
        growth window and where the factor is not given.
        """
        if not self.several:
            gather(self._signals, scale, extra)
            return
        # Alike on all ranks: probes go by the schedule, and DDP gives all of them values.grad.
        for signal in self._signals:
            signal.pending()
        waiting = [s for s in self._signals if _waits(s)]
        if not waiting:
            return
        for signal in waiting:  # a layer that this rank's batch did not reach adds nothing
            probe = signal.layer.probe
            if probe.grad is None:
                probe.grad = torch.zeros_like(probe, memory_format=torch.contiguous_format)
        scales = {} if scale is not None else scales_of(waiting, self._sketches(waiting))
        for signal in waiting:
            if not signal.linear:
                self._average(signal.layer.probe.grad)
            factor = scales[signal.view.group_index] if scale is None else scale
            signal.observe(extra * factor)
        self.gathered = True

    def _sketches(self, signals: Sequence[LayerSignal]) -> list[Tensor]:
        """Per signal float64 [3], as LayerSignal.comparison with the ranks' average."""
        pairs = [signal.gradients() for signal in signals]
        dense = torch.stack([self._sketch(raw) for raw, _ in pairs])
        self._average(dense)
        seen = torch.stack([self._sketch(grad) for _, grad in pairs])
        products = ((dense * dense).sum(1), (dense * seen).sum(1), (seen * seen).sum(1))
        return list(torch.stack(products, dim=1))

    def _sketch(self, vector: Tensor) -> Tensor:
        """Float64 [SKETCH]: sums of the entries (float64 [n]) with signs that all ranks share."""
        length = vector.numel()
        if self._signs.numel() < length:
            drawn = torch.randint(2, (length,), generator=torch.Generator().manual_seed(0))
            self._signs = (2 * drawn - 1).to(vector.device, torch.int8)
        padded = vector.new_zeros(-(-length // SKETCH) * SKETCH)
        padded[:length] = vector * self._signs[:length]
        return padded.view(-1, SKETCH).sum(0)

    def _average(self, tensor: Tensor) -> None:
        assert self.attachment is not None
        packed = tensor.contiguous()  # a dense gradient may lie by columns
        torch.distributed.all_reduce(packed, group=self.attachment.group)
        packed.div_(self.attachment.world)  # gloo has no average
        if packed is not tensor:
            tensor.copy_(packed)

    # ---- at an update --------------------------------------------------------------------------

    def reduce(self) -> None:
        """Average what the signals have gathered; a collective, on every rank at the same step."""
        if not self.several:
            return
        for signal in self._signals:
            if signal.linear:
                for name in sorted(signal.buffers):
                    self._average(signal.buffers[name])
        self.gathered = False

    def agree(
        self, states: Sequence[LayerState], changes: Sequence[LayerChange]
    ) -> Sequence[LayerChange]:
        """The changes that rank 0 has planned, on every rank.

        They are planned alike everywhere from equal numbers, but processors of two kinds may round
        otherwise, and a rule of the user's own may draw.  A plan that differs is logged.
        """
        if not self.several or not changes:
            return changes
        place = changes[0].keys.device
        counts = [[c.keys.numel(), c.removed] for c in changes]
        sizes = self._of_rank_0(torch.tensor(counts, device=place)).tolist()
        own = torch.cat([c.keys for c in changes])
        total = sum(stored for stored, _ in sizes)
        flat = own.clone() if own.numel() == total else own.new_zeros(total)
        parts = self._of_rank_0(flat).split([stored for stored, _ in sizes])
        agreed = []
        for state, change, keys, (_, removed) in zip(states, changes, parts, sizes, strict=True):
            if torch.equal(keys, change.keys):
                agreed.append(change)
                continue
            logger.warning(
                "layer %r: rank %d planned another mask than rank 0, whose mask is used; their "
                "weights or signals differ",
                state.name,
                torch.distributed.get_rank(self.attachment.group),  # type: ignore[union-attr]
            )
            added = None if change.added is None else keys[added_mask(state.keys, keys)]
            agreed.append(LayerChange(keys=keys.clone(), added=added, removed=removed))
        return agreed

    def _of_rank_0(self, tensor: Tensor) -> Tensor:
        assert self.attachment is not None
        torch.distributed.broadcast(tensor, group=self.attachment.group, group_src=0)
        return tensor

    def check_reduced(self) -> None:
        """Raise RuntimeError if the signals of this rank are not everybody's."""
        if self.several and self.gathered:
            raise RuntimeError(
                "the growth signal of this rank holds dense gradients of its own batches only, so "
                "its state_dict would be wrong on the other ranks; call synchronize() on every "
                "rank first, or save_checkpoint on every rank, which does"
            )


def _waits(signal: LayerSignal) -> bool:
    layer = signal.layer
    return layer.probe is not None and layer.values.grad is not None and not signal.frozen


def _numbers(cost: Mapping[str, float]) -> dict[str, float]:
    return {str(name): float(number) for name, number in cost.items()}


def _weak_look(ranks: RankAgreement) -> Any:
    """`ranks._look` as a forward pre-hook that does not keep it alive."""
    reference = weakref.ref(ranks)

    def look(module: nn.Module, inputs: Any) -> None:
        found = reference()
        if found is not None:
            found._look()

    return look
