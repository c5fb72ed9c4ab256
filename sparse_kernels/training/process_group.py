"""What the ranks of one job tell each other beside tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Result = TypeVar("_Result")


class Group:
    """A process group of torch.distributed; all methods are collectives, called on every rank."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank = torch.distributed.get_rank(group)
        self.world = torch.distributed.get_world_size(group)

    def gathered(self, mine: Any) -> list[Any]:
        """`mine` of every rank, rank 0's first."""
        found: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(found, mine, group=self.group)
        return found

    def everywhere(
        self, action: Callable[[], _Result], kind: type[Exception] = RuntimeError
    ) -> _Result:
        """What `action` returns on this rank; every rank does it, and one's error is everybody's.

        Raises `kind` on all ranks, naming the first that failed, with its text.
        """
        result: Any = None
        failure: Exception | None = None
        try:
            result = action()
        except Exception as problem:  # the others wait for an answer, whatever happened
            failure = problem
        told = None
        if failure is not None:
            told = str(failure) if isinstance(failure, kind) else repr(failure)
        for rank, text in enumerate(self.gathered(told)):
            if text is not None:
                raise kind(f"rank {rank} of this job: {text}") from failure
        found: _Result = result
        return found

    def on_rank_0(self, action: Callable[[], _Result]) -> _Result:
        """What `action` returns on rank 0, which alone does it; its error is everybody's.

        Raises that error on rank 0, RuntimeError with its text on the others.
        """
        box: list[Any] = [None, None]
        failure: Exception | None = None
        if self.rank == 0:
            try:
                box[0] = action()
            except Exception as problem:  # the others wait for an answer, whatever happened
                failure, box[1] = problem, repr(problem)
        torch.distributed.broadcast_object_list(box, group=self.group, group_src=0)
        if failure is not None:
            raise failure
        if box[1] is not None:
            raise RuntimeError(f"rank 0 of this job failed: {box[1]}")
        return box[0]
