"""Ctrl-C and SIGTERM as a wish that is looked at between two steps."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, TypeVar

Item = TypeVar("Item")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequested(Exception):
    """Raised between two batches of an evaluation once a signal has come."""


class StopSignals:
    """Context manager: ``signum`` is the signal that came, or None.

    A second Ctrl-C acts as Ctrl-C always does. Outside of the main thread, where Python installs no
    handlers, nothing is watched; nor is a signal that the parent process had ignored, as shells do
    with Ctrl-C for jobs in the background.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for signum in _SIGNALS:
                if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                    self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        name = signal.Signals(signum).name
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"\n{name}: stopping after this step, with a checkpoint\n".encode())
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before.clear()

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        """``items``, until a signal comes: then StopRequested."""
        for item in items:
            if self.signum is not None:
                raise StopRequested
            yield item


@contextmanager
def ending_by_exception() -> Iterator[None]:
    """SIGTERM, and SIGHUP where there is one, raise SystemExit(128 + signal) as Ctrl-C raises.

    So that what a process has started can be ended with it. Outside of the main thread, and for
    signals that have another handler than the default, nothing changes.
    """
    before: dict[int, Any] = {}

    def end(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if signal.getsignal(signum) is signal.SIG_DFL:
                before[signum] = signal.signal(signum, end)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
