"""Where results go: a journal while a benchmark runs, then JSON, Markdown and figures.

A journal is a file of JSON lines, one per finished row, so that an interrupted benchmark goes on
where it stopped. It is thrown away when the settings, the machine or the commit are not those of
its first line: rows of two programs do not make one table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .. import machine
from ..fetch import write_atomically

Row = dict[str, Any]
# What must be equal for rows to belong together.
_SAME = ("cpu", "isa", "threads", "gpu", "torch", "commit", "environment", "huge_pages")


def machine_folder(device: torch.device | None = None) -> str:
    """Folder name of this machine's results: its CPU's (or GPU's) name in letters and dashes."""
    gpu = device is not None and device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else machine.cpu_name()
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class Journal:
    """Rows by key; those that an interrupted run of the same benchmark has left are not made again.

    ``path`` None keeps rows in memory only.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path = path
        self.header = machine.header()
        self._identity = {"settings": settings, **{key: self.header[key] for key in _SAME}}
        # As JSON will give it back: tuples become lists.
        self._identity = json.loads(json.dumps(self._identity))
        self.rows: dict[str, Row] = {}
        self.resumed = 0  # rows taken over from an interrupted run
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if not self._take_over(path):
            path.write_text(json.dumps(self._identity) + "\n")

    def _take_over(self, path: Path) -> bool:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            if not lines or json.loads(lines[0]) != self._identity:
                return False
        except (OSError, ValueError):
            return False
        for line in lines[1:]:
            try:
                entry = json.loads(line)
            except ValueError:  # the line that was being written when the run was cut off
                break
            self.rows[entry["key"]] = entry["row"]
        self.resumed = len(self.rows)
        # Written anew, so that a broken last line is not appended to.
        text = [json.dumps({"key": key, "row": row}) for key, row in self.rows.items()]
        path.write_text("\n".join([json.dumps(self._identity), *text]) + "\n")
        return True

    def row(self, key: str, make: Callable[[], Row]) -> Row:
        """The row ``key``: as an interrupted run left it, or made now and written down."""
        if key not in self.rows:
            self.add(key, make())
        return self.rows[key]

    def add(self, key: str, row: Row) -> None:
        """Write down a row; it is on disk when this returns."""
        self.rows[key] = row
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "row": row}) + "\n")

    def remove(self) -> None:
        """Delete the file: the results hold everything now."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def publish(
    folder: Path,
    name: str,
    results: dict[str, Any],
    text: str,
    draw: Sequence[tuple[str, Callable[[dict[str, Any], Path], str | None]]],
) -> tuple[list[Path], list[str]]:
    """Write ``name``.json, ``name``.md and one PNG per entry of ``draw`` (suffix, function).

    Returns the files written and why a figure is missing. ``results`` must name its "command".
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.json", folder / f"{name}.md"]
    _write(files[0], json.dumps(results, indent=1) + "\n")
    missing = []
    lines = [text.rstrip(), ""]
    for suffix, function in draw:
        path = folder / f"{name}{suffix}.png"
        reason = function(results, path)
        if reason:
            missing.append(reason)
        else:
            files.append(path)
            lines += [f"![{name}{suffix}]({path.name})", ""]
    _write(files[1], "\n".join([*lines, f"`{results['command']}`", ""]))
    return files, list(dict.fromkeys(missing))


def _write(path: Path, text: str) -> None:
    def fill(file: BinaryIO) -> None:
        file.write(text.encode())

    write_atomically(path, fill)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of a Markdown table; the first ``left`` columns are text, the others are numbers."""
    marks = ["---"] * left + ["---:"] * (len(head) - left)
    return ["| " + " | ".join(cells) + " |" for cells in (head, marks, *rows)]


def milliseconds(timing: dict[str, Any]) -> str:
    """Median and quartiles: "12.3 [12.0, 12.9]"."""
    low, median, high = (1e3 * timing[key] for key in ("low", "median", "high"))
    return f"{median:.4g} [{low:.4g}, {high:.4g}]"
