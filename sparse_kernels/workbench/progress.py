"""A progress bar where somebody watches, plain lines where a log file does."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

try:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    _HAS_RICH = True
except ImportError:  # rich is optional: plain lines say the same
    _HAS_RICH = False


class TrainingProgress:
    """Context manager with one bar per contender; ``line`` prints above the bars."""

    def __init__(self, totals: dict[str, int], done: dict[str, int] | None = None) -> None:
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        if _HAS_RICH and sys.stdout.isatty():
            self._bar = Progress(
                TextColumn("{task.description:<8}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total} steps"),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
            )
            for name, total in totals.items():
                self._tasks[name] = self._bar.add_task(
                    name, total=total, completed=(done or {}).get(name, 0), note=""
                )

    def __enter__(self) -> TrainingProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, name: str, loss: float) -> None:
        """One step of the contender ``name`` is done."""
        if self._bar is not None:
            self._bar.update(self._tasks[name], advance=1, note=f"loss {loss:.3f}")

    def line(self, text: str) -> None:
        """Print one line."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)
