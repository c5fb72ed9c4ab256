"""A user's mistake is one line and exit code 1, never a traceback."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

# What torch says, as a plain RuntimeError, when memory does not suffice.
_ALLOCATION_FAILED = (
    "can't allocate memory", "not enough memory", "out of memory", "Storage size calculation"
)  # fmt: skip


def one_line_errors(command: Command) -> Command:
    """Turn the errors that a user can cause into one line; anything else is our own fault."""

    @functools.wraps(command)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        from ._load import NativeMissingError
        from .plan import BackendError
        from .workbench.errors import WorkbenchError

        try:
            return command(*arguments, **options)
        except (WorkbenchError, NativeMissingError, BackendError) as error:
            raise click.ClickException(" ".join(str(error).split())) from error
        except (ValueError, MemoryError, OSError, FloatingPointError) as error:
            # sparsify, SparseMomentum and the file system speak of what the options asked for.
            raise click.ClickException(
                f"{type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
        except RuntimeError as error:
            text = (str(error).splitlines() or [""])[0]
            if not any(words in text for words in _ALLOCATION_FAILED):
                raise
            raise click.ClickException(
                f"not enough memory ({text}); lower --batch-size or --width, or choose a smaller "
                "net"
            ) from error

    return wrapped  # type: ignore[return-value]
