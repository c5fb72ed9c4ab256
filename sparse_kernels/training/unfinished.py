"""A mask update that was stopped half way (Ctrl-C, no memory) must not pass for a whole one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LOST = (MemoryError, torch.OutOfMemoryError)


class Unfinished:
    """Remembers an update whose layers were changed in part, or that never came to change one.

    Python raises KeyboardInterrupt wherever it is.  Inside of an update some layers are rewritten
    then and others are not, or a layer has its new pattern and its old values; nothing of that
    shows in shapes, so a checkpoint written afterwards would be loaded and go on with it.
    """

    def __init__(self) -> None:
        self._step: int | None = None
        self._cause = ""
        self._changing = False

    @contextmanager
    def update(self, step: int) -> Iterator[None]:
        """Around a mask update after `step` steps.

        An error while it is planned (numbers that are not finite, a rule that is wrong) is an
        answer, and no layer has changed; an interrupt or a lack of memory there loses the update.
        """
        self._changing = False
        try:
            yield
        except BaseException as error:
            lost = isinstance(error, _LOST) or not isinstance(error, Exception)
            if self._changing or lost:
                self._step, self._cause = step, type(error).__name__
            raise

    def changes(self) -> None:
        """From here on the update changes layers."""
        self._changing = True

    def forget(self) -> None:
        """Model, optimizer and masks were loaded."""
        self._step = None

    def check(self) -> None:
        """Raise RuntimeError if the last update did not end."""
        if self._step is not None:
            raise RuntimeError(
                f"the mask update after step {self._step} was stopped half way by a "
                f"{self._cause}, so that patterns, weights and optimizer state of a layer may not "
                "belong together; go on from the last checkpoint: load model, optimizer and "
                "SparseMomentum"
            )
