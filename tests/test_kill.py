"""Trainings killed and resumed; `python tools/kill_runs.py` does the same by the thousand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import sparse_kernels

ROOT = Path(__file__).resolve().parent.parent
KILLS = 14


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """In a process of its own: it forks, which this one, with its threads, must not."""
    package = str(Path(sparse_kernels.__file__).resolve().parent.parent)
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "kill_runs.py"), "--kills", str(KILLS),
         "--place", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    last = done.stdout.splitlines()[-1] if done.stdout else ""
    assert done.returncode == 0 and ", 0 lost" in last, done.stdout + done.stderr
    found = re.match(r"kills (\d+) at (\d+) kinds", last)
    assert found and int(found[1]) >= KILLS and int(found[2]) >= 7
