"""The processes that a sweep trains in, one run each, of one thread."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

# Without the working directory: in a checkout, the sources there are not the package in use.
_PROGRAM = (
    "import sys; sys.path[:] = [path for path in sys.path if path]; "
    "from sparse_kernels.cli import main; main()"
)
STOPS = (130, 143, -signal.SIGINT, -signal.SIGTERM)
"""Exit codes of a run that a signal stopped."""


class Children:
    """The processes under way. After `terminate` none is started."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._ended = False

    def run(self, words: Sequence[str]) -> tuple[int, str]:
        """`sparse-kernels` with these words: its exit code, and the last line that it said."""
        with self._lock:
            if self._ended:
                return -signal.SIGTERM, ""
            # A session of its own: Ctrl-C reaches a child once, from here. It lets a first signal
            # write a checkpoint and a second one end it.
            child = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, *words], env=_environment(),
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            )  # fmt: skip
            self._running.add(child)
        try:
            out, error = child.communicate()
        finally:
            with self._lock:
                self._running.discard(child)
        return child.returncode, ((error.strip() or out.strip()).splitlines() or ["no output"])[-1]

    def terminate(self) -> None:
        """Let each write a checkpoint and end."""
        self._end(subprocess.Popen.terminate)

    def kill(self) -> None:
        """End them now."""
        self._end(subprocess.Popen.kill)

    def _end(self, how: Callable[[subprocess.Popen[str]], None]) -> None:
        with self._lock:
            self._ended = True
            for child in self._running:
                how(child)


def _environment() -> dict[str, str]:
    found = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, found.get("PYTHONPATH", "")]
    found["PYTHONPATH"] = os.pathsep.join(part for part in paths if part)
    return found
