"""Errors that a user can cause and repair; the command line prints them as one line."""

from __future__ import annotations


class WorkbenchError(RuntimeError):
    """What was expected, what came, what to do."""


class DataError(WorkbenchError):
    """A data file or download is missing or broken; the message names the file."""


class TrainingError(WorkbenchError):
    """A run cannot go on, for example because its loss is not a finite number."""


class TrainingStopped(WorkbenchError):
    """A signal ended the run; a checkpoint lies ready. ``exit_code`` is 128 + the signal."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum
