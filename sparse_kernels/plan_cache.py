"""Measured facts on disk: what ``tune`` found out stays, per machine, version and problem.

One JSON file per identity (CPU model, instruction set, threads, versions, the native module's
build) in the user's cache directory: SPARSE_KERNELS_CACHE, else XDG_CACHE_HOME/sparse_kernels, else
~/.cache/sparse_kernels.  An entry belongs to one ``problem_key``.  The cache only saves time: what
cannot be read is ignored with one warning, what cannot be written stays in memory.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import platform
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sparse_kernels._load import native_or_none

try:
    import fcntl
except ImportError:  # not a POSIX system: the last writer wins, files stay whole
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

FORMAT = 1
#: Densities are told apart in steps of this factor.
DENSITY_STEP = 1.1

Entry = dict[str, Any]


def directory() -> Path:
    """Where the files are; not made here.  An empty variable counts as unset."""
    named = os.environ.get("SPARSE_KERNELS_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sparse_kernels"


def cpu_model() -> str:
    """The processor's name as the operating system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@functools.cache
def _build(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]


def identity() -> dict[str, str]:
    """What measured facts depend on besides the problem; facts of another identity are foreign.

    The native module counts by commit and content, since a work tree builds many under one commit.
    """
    from sparse_kernels import __version__  # while the package is imported it has none yet

    native = native_or_none()
    built = "none"
    if native is not None:
        built = f"{native.build_info().get('commit', 'unknown')} {_build(str(native.__file__))}"
    return {
        "cpu": cpu_model(),
        "isa": "none" if native is None else str(native.isa()),
        "threads": str(torch.get_num_threads()),
        "sparse_kernels": __version__,
        "native": built,
        "torch": torch.__version__,
    }


def power_of_two(count: int) -> int:
    """The power of two nearest to ``count`` by ratio: the bucket of a batch size (0 stays 0)."""
    return 0 if count < 1 else 2 ** round(math.log2(count))


def density_bucket(density: float) -> str:
    """The bucket of a density in (0, 1], as its centre in per cent."""
    steps = round(math.log(density) / math.log(DENSITY_STEP))
    return f"{100 * DENSITY_STEP**steps:.4g}%"


def problem_key(op: str, **facts: object) -> str:
    """One readable line for a problem: operator, then name=value in the order given."""
    return " ".join([op, *(f"{name}={_plain(value)}" for name, value in facts.items())])


def _plain(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


class PlanCache:
    """The facts of one identity: a mapping from problem key to entry, backed by a file.

    An entry is a JSON object whose numbers are finite.  Reading happens once, at the first use;
    ``put`` merges with what other processes wrote meanwhile and replaces the file atomically.
    """

    def __init__(self, folder: Path | None = None, facts: Mapping[str, str] | None = None) -> None:
        self.facts = dict(identity() if facts is None else facts)
        digest = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:16]
        self.path = (directory() if folder is None else Path(folder)) / f"plan-{digest}.json"
        self._entries: dict[str, Entry] | None = None

    def get(self, key: str) -> Entry | None:
        """The entry of a problem (a copy), or None."""
        if self._entries is None:
            self._entries = self._read()
        found = self._entries.get(key)
        return None if found is None else json.loads(json.dumps(found))

    def put(self, key: str, entry: Entry) -> None:
        """Remember an entry, here and on disk where that can be written.

        Raises:
            ValueError: an entry that JSON cannot hold, or a number in it that is not finite.
        """
        json.dumps(entry, allow_nan=False)
        self.get(key)  # what this process knows; the file may hold more by now
        assert self._entries is not None
        self._entries[key] = entry
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked():
                on_disk = self._read()
                self._write({**on_disk, **self._entries})
        except OSError as problem:
            logger.info("measured plans are not kept: cannot write %s (%s)", self.path, problem)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One reader-then-writer at a time; without file locks an entry may be lost, no more."""
        if fcntl is None:
            yield
            return
        with open(self.path.with_suffix(".lock"), "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield  # closing the file gives the lock back

    def _write(self, entries: dict[str, Entry]) -> None:
        content = {"format": FORMAT, "identity": self.facts, "entries": entries}
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=".plan-", suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(content, file, indent=1, sort_keys=True, allow_nan=False)
            os.replace(name, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise

    def _read(self) -> dict[str, Entry]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as problem:
            return self._ignore(f"it cannot be read ({problem})")
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            return self._ignore("it is no plan cache of this format")
        if content.get("identity") != self.facts:
            return self._ignore("it is of another machine or version")
        entries = content.get("entries")
        if not isinstance(entries, dict) or not all(
            isinstance(entry, dict) and _finite(entry) for entry in entries.values()
        ):
            return self._ignore("its entries are damaged")
        return entries

    def _ignore(self, why: str) -> dict[str, Entry]:
        if self.path not in _warned:
            _warned.add(self.path)
            warnings.warn(
                f"the plan cache {self.path} is ignored: {why}. Layers are measured again and the "
                "file is replaced; delete it if this comes back",
                RuntimeWarning,
                stacklevel=2,
            )
        return {}


_warned: set[Path] = set()


def _finite(value: object) -> bool:
    """Whether every number in a JSON value is finite (Python's reader takes NaN)."""
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
