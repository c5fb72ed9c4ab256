"""Plants a fault into a copy of csrc, builds what it touches, and runs the tests that must fail.

The lists are planted_faults.py and planted_mma_faults.py.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import emulation_build

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

KERNELS, DENSE, BLOCKS = "test_kernels.py", "test_dense.py", "test_mma_kernels.py"
CHANGE, STREAMS = "test_pattern_change.py", "test_streams.py"
STAGED_WGRAD, NORM_POOL = "test_staged_wgrad.py", "test_norm_pool.py"


class Fault(NamedTuple):
    """`before` in `file` becomes `after`; `tests` is pytest's -k expression of `suite` that must
    fail, or pass where `harmless`. `unit` is the source that is compiled with it: the kernels of
    one dtype are enough.
    """

    name: str
    file: str
    before: str
    after: str
    tests: str
    unit: str
    suite: str = KERNELS
    # Two rows of thread blocks: what each does several tiles for, as in grids above kMaxGridY.
    small_grid: bool = False
    harmless: bool = False


# What a finding looks like, in pytest's lines of the failure: an assertion, a fault of the
# emulator, or a refusal by the runtime. An error of the compiler or of collection is none.
FINDING = re.compile(
    r"E +(AssertionError|assert )|launch failed|Synchronize failed|cub::\w+::\w+ failed|cudaError"
    r"|capture was broken"
)


def replace_once(source: Path, before: str, after: str) -> None:
    """SystemExit unless `before` is in `source` once, its words on however many lines."""
    text = source.read_text()
    pattern = re.compile(r"\s+".join(map(re.escape, before.split())))
    found = len(pattern.findall(text))
    if found != 1:
        raise SystemExit(f"expected {before!r} once in {source}, found {found}")
    source.write_text(pattern.sub(lambda _: after, text))


def plant(fault: Fault, folder: Path) -> Path:
    """A copy of csrc with the fault in it."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    replace_once(csrc / "cuda" / fault.file, fault.before, fault.after)
    return csrc


def includes(unit: str) -> set[str]:
    """Names of the files of csrc/cuda that a source is made of, its own among them."""
    found, new = set(), {unit}
    while new:
        found |= new
        texts = [(ROOT / "csrc" / "cuda" / name).read_text() for name in new]
        named = {name for text in texts for name in re.findall(r'#include "cuda/(\S+)"', text)}
        new = named - found
    return found


def run_tests(fault: Fault) -> subprocess.CompletedProcess[str]:
    """The fault's tests, run on a module with the fault in it; RuntimeError where that does not
    compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        csrc = plant(fault, Path(folder))
        module = emulation_build.build_planted(csrc, fault.unit, Path(folder) / "out")
        environment = os.environ | {"SPARSE_KERNELS_EMULATION_MODULE": str(module)}
        if fault.small_grid:
            environment["SPARSE_KERNELS_EMULATION_GRID"] = "2"
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        command += ["-k", fault.tests, str(HERE / fault.suite)]
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False
        )


def is_found(fault: Fault) -> bool:
    """Whether the tests fail, by a failed assertion or a fault of the emulator, not otherwise; of
    a harmless change, whether they pass. Prints the finding.
    """
    done = run_tests(fault)
    if fault.harmless:
        passed = done.returncode == 0
        print(f"{'passed' if passed else 'FAILED'} {fault.name}: no fault, tests have to pass")
        print("       " + done.stdout.strip().splitlines()[-1], flush=True)
        return passed
    lines = [line for line in done.stdout.splitlines() if re.match(r"E   +\S", line)]
    found = done.returncode == 1 and any(FINDING.search(line) for line in lines)
    print(f"{'found ' if found else 'MISSED'} {fault.name}")
    told = lines[0][1:].strip()[:200] if lines else (done.stdout + done.stderr).strip()[-300:]
    print("       " + told, flush=True)
    return found


def main(faults: tuple[Fault, ...], words: list[str]) -> int:
    """Plants those whose name contains one of the words (all without words); returns the exit
    status: 1 if one was missed.
    """
    chosen = [f for f in faults if not words or any(word in f.name for word in words)]
    if not chosen:
        raise SystemExit(f"no fault has {' or '.join(words)} in its name")
    before = os.times()
    emulation_build.build("checked")
    missed = [fault.name for fault in chosen if not is_found(fault)]
    planted = [fault for fault in chosen if not fault.harmless]
    found = sum(fault.name not in missed for fault in planted)
    after = os.times()
    spent = after.children_user - before.children_user + after.children_system
    spent -= before.children_system
    print(f"{found} of {len(planted)} planted faults found, {spent:.0f} s of CPU time")
    return 1 if missed else 0
