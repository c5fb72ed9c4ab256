"""What a sweep keeps: a JSON line per finished run, and one per run that failed."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from .errors import WorkbenchError
from .fetch import write_atomically
from .report import read_run

Row = dict[str, Any]
LINES = "sweep.jsonl"
_FAILED = "failed.jsonl"


def read(folder: Path) -> list[Row]:
    """The finished runs in the order in which they ended. Raises WorkbenchError if none are there.

    A line that was being written when the sweep was cut off is left out.
    """
    path = folder / LINES
    if not path.is_file():
        raise WorkbenchError(f"{path}: no such file; expected a sweep")
    rows = held(folder)
    if not rows:
        raise WorkbenchError(f"{path}: no finished run yet; let the sweep go on")
    return rows


def held(folder: Path) -> list[Row]:
    """The finished runs, none if there is no file yet; of two lines of one run the first."""
    return list({row["name"]: row for row in reversed(_parsed(folder / LINES))}.values())[::-1]


def failures(folder: Path) -> list[Row]:
    """Of runs that have failed and not been finished since: what `add_failure` wrote last."""
    done = {row["name"] for row in held(folder)}
    last = {row["name"]: row for row in _parsed(folder / _FAILED)}
    return [row for name, row in last.items() if name not in done]


def add(folder: Path, row: Row) -> None:
    """Append the line of a run that has finished."""
    _append(folder / LINES, row)


def add_failure(folder: Path, row: Row) -> None:
    """Append the line of a run that has failed, with its "reason"."""
    _append(folder / _FAILED, row)


def rewrite(folder: Path, more: Sequence[Row] = ()) -> None:
    """Write the finished runs and `more` anew, without a line that was cut off: nothing is appended
    to a broken line.
    """
    path = folder / LINES
    text = "".join(json.dumps(row) + "\n" for row in (*held(folder), *more))
    if not path.exists() or text != path.read_text(encoding="utf-8"):
        write_atomically(path, partial(_fill, text))


def sparse_run(folder: Path, row: Row) -> dict[str, Any] | None:
    """The whole results of the run of a line: from the sweep, wherever it lies now, or from where
    the command wrote them, as of a run taken over; None if they are gone or broken.
    """
    words = shlex.split(row["command"])
    out, name = (words[words.index(option) + 1] for option in ("--out", "--name"))
    for place in (folder / "runs" / row["name"], Path(out) / name):
        with contextlib.suppress(WorkbenchError):
            runs = read_run(place)["runs"]
            return next((run for run in runs if run["contender"] == "sparse"), None)
    return None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the directory, and keep other sweeps out of it. Raises WorkbenchError if one is at work.

    The kernel frees the lock of a process that was killed.
    """
    import fcntl  # POSIX only

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WorkbenchError(
                f"{folder}: another sweep is at work here; wait for it, or give another --out"
            ) from error
        yield


def _append(path: Path, row: Row) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _fill(text: str, file: BinaryIO) -> None:
    file.write(text.encode())


def _parsed(path: Path) -> list[Row]:
    """The whole lines; none if there is no file."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and "name" in row:
                rows.append(row)
    return rows
