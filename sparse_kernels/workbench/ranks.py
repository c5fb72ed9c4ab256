"""`sparse-kernels train` as one of several processes that torchrun has started, or as the only one.

Every rank draws the same global batch and trains on its share of it; rank 0 evaluates, prints and
writes.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..training import attach
from ..training.process_group import Group
from .errors import TrainingError, WorkbenchError

_Result = TypeVar("_Result")
_PAUSE = 2.0
"""Seconds before a rank that has lost another ends: torchrun, which looks every 0.1 s, names as the
cause the one that ended first, and then ends the others itself.
"""
_LOST = re.compile("Connection closed by peer|Connection reset|Broken pipe|Connection refused")


class Ranks:
    """The processes of this job. ``world`` 1: everything is local, and nothing is communicated."""

    def __init__(self, group: Group | None = None) -> None:
        self._group = group
        self.rank = 0 if group is None else group.rank
        self.world = 1 if group is None else group.world

    @property
    def group(self) -> Group | None:
        """The process group, None for a single process and once the job has ended."""
        return self._group

    def leave(self) -> None:
        """Let go of the process group; ``rank`` and ``world`` stay."""
        self._group = None

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model to call: under DistributedDataParallel where there are several ranks."""
        if self._group is None:
            return model
        return attach(nn.parallel.DistributedDataParallel(model))

    def share(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """This rank's examples of a global batch, [n, ...] each: every world-th."""
        if self.world == 1:
            return tensors
        return tuple(tensor[self.rank :: self.world] for tensor in tensors)

    def sum(self, number: float) -> float:
        """The sum over the ranks."""
        if self._group is None:
            return number
        total = torch.tensor(number, dtype=torch.float64)
        torch.distributed.all_reduce(total)
        return total.item()

    def largest(self, *numbers: int) -> tuple[int, ...]:
        """The largest over the ranks of each number."""
        if self._group is None:
            return numbers
        found = torch.tensor(numbers)
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
        return tuple(found.tolist())

    def of_each(self, text: str) -> str:
        """``text`` where every rank has the same, else each other text with the first such rank."""
        found = [text] if self._group is None else self._group.gathered(text)
        first = {each: rank for rank, each in reversed(list(enumerate(found)))}
        if len(first) == 1:
            return text
        ordered = sorted(first.items(), key=lambda item: item[1])
        return "; ".join(f"rank {rank}: {each}" for each, rank in ordered)

    def on_rank_0(self, action: Callable[[], _Result]) -> _Result:
        """What ``action`` returns on rank 0, which alone does it."""
        return action() if self._group is None else self._group.on_rank_0(action)

    def check_batches(self, images: int, batch_size: int) -> None:
        """Raise WorkbenchError unless every rank gets an example or more of every batch."""
        smallest = images % batch_size or batch_size
        if smallest < self.world:
            raise WorkbenchError(
                f"--batch-size {batch_size}: the last of {images} images make a batch of "
                f"{smallest}, expected at least one for each of {self.world} processes; choose "
                "another batch size or fewer processes"
            )


@contextlib.contextmanager
def of_environment() -> Iterator[Ranks]:
    """The ranks that torchrun's environment variables tell of; ranks but 0 print nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    begun = not torch.distributed.is_initialized()
    if begun:
        _init_process_group()
    ranks = Ranks(Group(torch.distributed.group.WORLD))
    with contextlib.ExitStack() as stack:
        if ranks.rank:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        try:
            yield ranks
        except RuntimeError as error:
            if not _LOST.search(str(error)):
                raise
            time.sleep(_PAUSE)
            raise TrainingError(
                f"rank {ranks.rank} of {ranks.world} has lost another rank, which has died or is "
                f"out of reach; torchrun's report names it ({_first_line(error)})"
            ) from error
    if begun:
        # gloo's threads end with the last reference to the group. One that drops a tensor while
        # the interpreter shuts down aborts it ("terminate called without an active exception").
        ranks.leave()
        gc.collect()  # DistributedDataParallel lies in cycles
        torch.distributed.destroy_process_group()


def _init_process_group() -> None:
    """gloo at the place that torchrun names, under keys of this attempt.

    torch 2.13 keeps torchrun's store over a restart: ranks of the second attempt would find there
    the addresses of the first one's dead processes.
    """
    # Its functions take the group there is when it is imported as a default, for good; later
    # DistributedDataParallel would import it.
    importlib.import_module("torch.distributed.nn.functional")
    store, rank, world = next(torch.distributed.rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = torch.distributed.PrefixStore(f"attempt {attempt}", store)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
