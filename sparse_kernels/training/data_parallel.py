"""DistributedDataParallel around a sparse model: what it reduces, and what it must not go on using.

DDP hooks the gradient of every parameter once, when it is made, and lays the gradients out in
buckets of that moment's sizes.  A layer that outgrows its capacity, changes its storage or loads
another pattern keeps its Parameter object but gives it memory of another shape: torch then makes
another gradient accumulator, which DDP's hooks are not on, and that layer would train on its own
on every rank.  `attach` looks at this before each forward pass and builds the reducer anew.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import weakref
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from sparse_kernels.nn.base import COMPRESSED, SparseLayer

from .layers import sparse_layers
from .process_group import Group

logger = logging.getLogger(__name__)

_INDICES = ("crow_indices", "col_indices", "t_crow", "t_row", "t_perm", "mask")
_HELD = "sparse_kernels: held"
_attached: weakref.WeakKeyDictionary[nn.Module, Attachment] = weakref.WeakKeyDictionary()


def is_ddp(model: Any) -> bool:
    """Whether `model` is a DistributedDataParallel."""
    return _distributed() and isinstance(model, nn.parallel.DistributedDataParallel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that a DistributedDataParallel wraps; any other model itself."""
    return cast(nn.Module, model.module) if is_ddp(model) else model


def driven_model(model: nn.Module) -> nn.Module:
    """`unwrapped`, for SparseMomentum; raises ValueError for a model that is split over ranks."""
    refuse_sharded(model)
    return unwrapped(model)


def active_ddp() -> Any:
    """The DistributedDataParallel whose forward pass is under way, or None."""
    return nn.parallel.DistributedDataParallel._get_active_ddp_module() if _distributed() else None


def several_ranks() -> bool:
    """Whether this process is one of a job of several."""
    if not (_distributed() and torch.distributed.is_initialized()):
        return False
    return torch.distributed.get_world_size() > 1


def _distributed() -> bool:
    return torch.distributed.is_available()


def attach(ddp: nn.Module) -> nn.Module:
    """Make a DistributedDataParallel follow the sparse layers that it wraps; returns it.

    Call it on every rank.  `SparseMomentum` does so by itself.  From then on

    - index buffers and masks are not broadcast before every forward pass: they are equal on all
      ranks, since DDP sent rank 0's when it was made, and mask updates keep them so;
    - a forward pass after a layer's `values` have been given other memory (capacity outgrown,
      another storage, a checkpoint) first builds DDP's reducer anew, in place, on every rank.
      Communication hooks made by `register_comm_hook` stay; their own state is theirs.

    Raises TypeError for another module, RuntimeError if the ranks' patterns, storages or capacities
    differ.
    """
    if not is_ddp(ddp):
        raise TypeError(
            f"attach takes a DistributedDataParallel, got {type(ddp).__name__}; wrap the model "
            "first: attach(DistributedDataParallel(model))"
        )
    if ddp not in _attached:
        _attached[ddp] = Attachment(ddp)
    return ddp


def attachment(ddp: nn.Module) -> Attachment:
    """The attachment of a DistributedDataParallel, made if there is none."""
    return _attached[attach(ddp)]


def attachment_of(model: nn.Module, masks: Any = None) -> Attachment | None:
    """The job that `model` (a DistributedDataParallel) or SparseMomentum `masks` is part of."""
    if is_ddp(model):
        return attachment(model)
    return None if masks is None else masks.attachment


def job_of(model: nn.Module, masks: Any = None) -> Group | None:
    """The ranks that a checkpoint of `model` and `masks` is of; None for a single process.

    SparseMomentum that was given the model inside of a DistributedDataParallel knows of it from the
    first forward pass on; until then all processes of the job count.
    """
    job = attachment_of(model, masks)
    if job is None and masks is not None and several_ranks():
        return Group(torch.distributed.group.WORLD)
    return job


class Attachment(Group):
    """The sparse layers of one DistributedDataParallel and the accumulators that it has hooked."""

    def __init__(self, ddp: Any) -> None:
        super().__init__(ddp.process_group)
        self._ddp = weakref.ref(ddp)
        self.rebuilt = 0  # how often the reducer was built anew
        for _, layer in self.layers():
            if layer.storage == COMPRESSED:
                layer._pattern = None  # DDP has written rank 0's indices into the buffers
                layer.pattern.validate()
        self.check_equal()
        ignored = {f"{name}.{b}".lstrip(".") for name, _ in self.layers() for b in _INDICES}
        ddp.parameters_to_ignore = set(ddp.parameters_to_ignore) | ignored
        ddp._assign_modules_buffers()  # it looks at its list before it makes it anew
        # Values may have got other memory since the model was wrapped (a checkpoint).
        if not self._obstacles(ddp):
            self._rebuild_reducer(ddp)
        elif any(self.gathered(self._stale())):
            self._refuse_rebuild(ddp)
        self._hooked = self._accumulators()
        ddp.register_forward_pre_hook(lambda module, inputs: self._before_forward())

    @property
    def ddp(self) -> Any:
        found = self._ddp()
        assert found is not None, "an attachment is used by its DistributedDataParallel's hooks"
        return found

    def layers(self) -> Iterator[tuple[str, SparseLayer]]:
        """(name without "module.", layer) of every sparse layer."""
        return sparse_layers(self.ddp.module)

    def _accumulators(self) -> list[Any]:
        """What gathers the gradient of each layer's values; None for a frozen one."""
        edges = (
            get_gradient_edge(layer.values) if layer.values.requires_grad else None
            for _, layer in self.layers()
        )
        return [None if edge is None else edge.node for edge in edges]

    def _before_forward(self) -> None:
        now = self._accumulators()
        same = len(now) == len(self._hooked) and all(
            new is None or new is old for new, old in zip(now, self._hooked, strict=True)
        )
        if not same:
            self.rebuild()

    def rebuild(self) -> None:
        """Build the reducer anew, as unpickling a DistributedDataParallel does.

        Raises RuntimeError where that cannot be done in place, with what to do instead.
        """
        ddp = self.ddp
        self._refuse_rebuild(ddp)
        self.check_equal()
        self._rebuild_reducer(ddp)
        self.rebuilt += 1
        logger.info("sparse values were reallocated: DDP's reducer was built anew")

    def _rebuild_reducer(self, ddp: Any) -> None:
        hooks = list(ddp._comm_hooks)
        # The old reducer takes its hooks off when it goes; its logger holds it, too.
        del ddp.reducer, ddp.logger
        # A static graph's first iteration queues the average of all gradients: the new one's, too.
        ddp._static_graph_delay_allreduce_enqueued = False
        ddp.__setstate__({})
        ddp._comm_hooks.clear()
        for hook, state in hooks:
            ddp.register_comm_hook(state, hook)
        self._hooked = self._accumulators()

    def _refuse_rebuild(self, ddp: Any) -> None:
        obstacles = self._obstacles(ddp)
        if obstacles:
            raise RuntimeError(
                "sparse values have new memory, and the gradient reducer of this "
                "DistributedDataParallel still points to the old; it cannot be built anew in place "
                f"with {' and '.join(obstacles)}. Wrap the model again when "
                "UpdateRecord.reallocated or storage_changes is not empty, or exclude that: "
                "training.reserve(model, optimizer, room=math.inf) before wrapping, and "
                "dense_above=1"
            )

    def _stale(self) -> bool:
        """Whether a layer's `values` have an accumulator that the reducer does not hold.

        Nothing else keeps one between two steps: what is noted on it is gone with it.
        """
        ignored = self.ddp.parameters_to_ignore
        trained = [
            layer.values
            for name, layer in self.layers()
            if layer.values.requires_grad and f"{name}.values".lstrip(".") not in ignored
        ]
        for values in trained:
            _notes(values)[_HELD] = True
        found = [_notes(v).pop(_HELD, False) for v in trained]
        return not all(found)

    def _obstacles(self, ddp: Any) -> list[str]:
        """Why the reducer cannot be built anew in place."""
        reasons = []
        if self.group is not torch.distributed.group.WORLD:
            reasons.append("a process group of its own")
        if ddp.mixed_precision is not None:
            reasons.append("mixed_precision")
        if ddp.static_graph and not ddp.require_backward_grad_sync:
            reasons.append("static_graph inside of no_sync()")
        named = ddp._get_ddp_logging_data().get("comm_hook", "")
        if named and not ddp._comm_hooks:
            reasons.append(f"the built-in communication hook {named}")
        return reasons

    def check_equal(self) -> None:
        """Raise RuntimeError, naming a layer, unless every rank stores the same blocks alike."""
        found = self.gathered([(name, _digest(layer)) for name, layer in self.layers()])
        for rank, theirs in enumerate(found):
            differing = [name for name, digest in found[0] if (name, digest) not in theirs]
            if differing:
                raise RuntimeError(
                    f"layer {differing[0]!r}: pattern, storage or capacity of rank {rank} are not "
                    "those of rank 0; expected equal ones. Wrap the model in "
                    "DistributedDataParallel after sparsify and after loading a checkpoint, and "
                    "do both alike on every rank"
                )


def _notes(values: Tensor) -> dict[str, Any]:
    """A dict that lives as long as the accumulator of `values`."""
    found: Any = get_gradient_edge(values).node.metadata  # typed as a method, is a property
    return cast(dict[str, Any], found)


def _digest(layer: SparseLayer) -> str:
    """Of what decides which weight a slot of `values` is."""
    keys = layer.pattern.keys().to("cpu", torch.int64).contiguous()
    facts = (layer.storage, tuple(layer.values.shape), layer.block, layer.values.requires_grad)
    return hashlib.sha256(repr(facts).encode() + _bytes(keys)).hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()


def refuse_sharded(model: nn.Module) -> None:
    """Raise ValueError if FullyShardedDataParallel (or fully_shard) has split the model's values.

    A shard holds a range of slots of `values`, and which weight a slot is changes at every mask
    update; the update needs all weights of a layer and its optimizer's state, rewritten together.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: nothing can be of its types
    if fsdp is None:
        return
    kinds = tuple(
        getattr(fsdp, name)
        for name in ("FullyShardedDataParallel", "FSDPModule")
        if hasattr(fsdp, name)
    )
    for name, module in model.named_modules():
        if isinstance(module, kinds) and any(True for _ in sparse_layers(module)):
            raise ValueError(
                f"module {name!r} is split over ranks by FullyShardedDataParallel, which the mask "
                "updates of SparseMomentum cannot follow: each rank holds a range of the slots of "
                "`values`, and an update gives the slots of a whole layer, with the optimizer's "
                "state, to other weights. Wrap the model in DistributedDataParallel (at density d "
                "a rank holds d of the dense weights), or leave sparse layers out of the sharding"
            )
