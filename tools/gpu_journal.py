"""What a GPU machine's checks have done, on disk after every case, so that a run cut off goes on.

A journal is a file of JSON lines: a case that begins, then its result. Results are taken over only
on the same machine and from the same sources (``fingerprint``); older lines stay in the file. A
case that began twice and never ended broke its process: it is reported, not tried a third time.
Neither torch nor the package is needed here.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ATTEMPTS = 2
FAULT = "fault: "  # begins the keys of contenders that broke a process; their rows go on without
# Variables for gpu_recorder.py: the journal's path, its identity as JSON, the seconds since 1970
# after which no test begins, a process's share of the tests as "i/n", what precedes names as keys.
PATH, IDENTITY, DEADLINE, SHARE, PREFIX = (
    f"GPU_JOURNAL_{name}" for name in ("PATH", "IDENTITY", "DEADLINE", "SHARE", "PREFIX")
)
BUILT = ("sparse_kernels", "csrc", "make", "CMakeLists.txt", "setup.py", "pyproject.toml")
_SUFFIXES = (".py", ".cpp", ".h", ".cu", ".cuh", ".toml", ".txt", ".cmake", ".mk")


def fingerprint(*names: str, root: Path = ROOT) -> str:
    """12 hex digits that change with any source file below ``names``, folders or files of root."""
    digest = hashlib.sha256()
    for name in sorted(names):
        top = root / name
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            if path.suffix in _SUFFIXES and path.is_file():
                digest.update(f"{path.relative_to(root)}\0".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


class Entry(NamedTuple):
    """A finished case: "passed", "failed" or "skipped", and what else it has to tell."""

    key: str
    outcome: str
    row: dict[str, Any]
    sources: str = ""  # the fingerprint that its identity names


class Journal:
    """Finished cases by key. ``identity`` names machine, versions and sources; plain JSON.

    Several processes may write to one file: a line is one write to a file opened for appending.
    """

    def __init__(self, path: Path, identity: dict[str, Any], ignoring: Sequence[str] = ()) -> None:
        self.path, self.identity = path, json.loads(json.dumps(identity))
        self.ignoring = ignoring  # of the identity: lines that differ in these count too
        self.entries: dict[str, Entry] = {}
        self.begun: dict[str, int] = {}
        self.totals: dict[str, int] = {}  # cases there are, by the prefix of their keys
        path.parent.mkdir(parents=True, exist_ok=True)
        self.reload()

    def reload(self) -> None:
        """Read the file (again: other processes write to it)."""
        self.entries.clear()
        self.begun.clear()
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        ours, last = False, None
        for line in text.splitlines():
            try:
                found = json.loads(line)
            except ValueError:  # the line that was being written when the run was cut off
                continue
            if "identity" in found:
                ours, last = self._is_ours(found["identity"]), found["identity"]
            elif ours:
                self._take(found, (last or {}).get("sources", ""))
        broken = bool(text) and not text.endswith("\n")  # must not swallow the next line
        if broken or last != self.identity:
            self._write({"identity": self.identity}, "\n" if broken else "")

    def _is_ours(self, other: dict[str, Any]) -> bool:
        names = (self.identity.keys() | other.keys()) - set(self.ignoring)
        return all(self.identity.get(name) == other.get(name) for name in names)

    def _take(self, found: dict[str, Any], sources: str) -> None:
        """One line of the file."""
        if "begun" in found:
            self.begun[found["begun"]] = self.begun.get(found["begun"], 0) + 1
        elif "forgotten" in found:
            self.entries.pop(found["forgotten"], None)
            self.begun.pop(found["forgotten"], None)
        elif "total" in found:
            self.totals[found["prefix"]] = found["total"]
        else:
            key, outcome = found["key"], found["outcome"]
            self.entries[key] = Entry(key, outcome, found["row"], sources)

    def _write(self, line: dict[str, Any], before: str = "") -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(before + json.dumps(line) + "\n")

    def begin(self, key: str) -> None:
        """Note that a case is under way."""
        self._note({"begun": key})

    def finish(self, key: str, outcome: str, **row: Any) -> None:
        """Write down a case's result; it is in the file when this returns."""
        self._note({"key": key, "outcome": outcome, "row": row})

    def settled(self, key: str) -> bool:
        """Whether the case needs no run: it is finished, or given up now as one that breaks."""
        if key in self.entries:
            return True
        if self.begun.get(key, 0) < ATTEMPTS:
            return False
        why = f"the process ended {ATTEMPTS} times before this case did"
        self.finish(key, "failed", why=why)
        return True

    def count(self, prefix: str, total: int) -> None:
        """Note how many cases there are whose keys begin with ``prefix``."""
        self._note({"prefix": prefix, "total": total})

    def forget(self, key: str) -> None:
        """Let a case run again, its earlier tries uncounted."""
        self._note({"forgotten": key})

    def forget_failures(self) -> None:
        """Let what failed run again."""
        for key in [e.key for e in self.entries.values() if e.outcome == "failed"]:
            self.forget(key)

    def _note(self, line: dict[str, Any]) -> None:
        line = json.loads(json.dumps(line))  # as it will be read: tuples become lists
        self._take(line, self.identity.get("sources", ""))
        self._write(line)

    def failures(self, prefix: str = "") -> list[str]:
        """ "key: why" of the failed cases whose key begins with ``prefix``."""
        return [
            f"{e.key}: {e.row.get('why', 'failed')}"
            for e in self.entries.values()
            if e.outcome == "failed" and e.key.startswith(prefix)
        ]


def last_of(path: Path, ignoring: Sequence[str] = ()) -> Journal:
    """The journal at ``path`` as it was last written to. Raises FileNotFoundError, or ValueError
    where nothing was written.
    """
    for line in reversed(path.read_text(encoding="utf-8").splitlines()):
        try:
            found = json.loads(line)
        except ValueError:  # the line that was being written when the run was cut off
            continue
        if "identity" in found:
            return Journal(path, found["identity"], ignoring)
    raise ValueError(f"expected a journal's identity in {path}, found none: nothing was run there")


def left(journal: Journal, keys: Iterable[str]) -> list[str]:
    """The cases that are to be run, in their order."""
    return [key for key in keys if not journal.settled(key)]


def share(names: Sequence[str], index: int, count: int) -> list[str]:
    """One of ``count`` disjoint shares of ``names``, the same in every run."""
    return [name for name in names if zlib.crc32(name.encode()) % count == index]


def cuda_works() -> bool:
    """False where an earlier kernel has broken this process's CUDA context; nothing mends that."""
    import torch

    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
