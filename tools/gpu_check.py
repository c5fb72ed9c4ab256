"""Check this checkout on a GPU machine without network: build, tests, sanitizer, benchmarks.

On a machine with a GPU and a CUDA build of torch:         python tools/gpu_check.py
The rehearsal, the same steps on the CPU with small sizes: ... --device cpu --size small
One part, where a machine is lent for minutes only:        ... --part bench

Parts, in the order in which they are run, the most telling first:

  build      install into build/gpu-check/site; with nvcc its CUDA part too. A package of the same
             sources that an earlier call has left in the state folder is unpacked instead
  smoke      every operator by every backend against float64, small shapes: about a minute
  targets    tools/gpu_bench: the rows of the targets of issues 4 and 5
  tests      pytest -m gpu, some processes side by side
  sanitizer  compute-sanitizer (memcheck, then racecheck) on small cases, where the tool is found
  bench      tools/gpu_bench: all layers and whole steps inside CUDA graphs
  ops        single operators against dense, launches included

Every part but build stops after --minutes: 8; on a GPU, where all parts are run, 2 for smoke
and 6 for targets. No case begins later. What is done is in journals in the state folder (--state,
build/gpu-check/state), line by line, so that the same command goes on where it stopped or was
killed: on the same kind of GPU and with the same sources nothing is run twice. --total bounds the
whole call. A failed case is noted and the rest goes on, after a part that cannot run too; it is
tried again only with --again, or when sources change. Exit status: 0 all passed, 1 something failed
(listed last), 3 nothing failed and cases are left.

On a lent machine (the tool `run`: 10 minutes a call, 30 in all, 2 to 3 of them for starting; every
machine is bare, and what comes back is 8 files of 16 MiB below $OUT). The state folder is $OUT
itself: bench.jsonl, smoke.jsonl, tests.jsonl, sanitizer.jsonl, report.md, site.tar.gz and log. They
come back even when a call is killed. Three calls, the same each time, timeout_s 600:

  carry: ["build/gpu-state"]       (first, here: mkdir -p build/gpu-state)
  command: cp build/gpu-state/* $OUT/ 2>/dev/null; set -o pipefail; export PYTHONUNBUFFERED=1;
           export CMAKE_ARGS=-DCMAKE_CUDA_ARCHITECTURES=90a-real;
           python3 tools/gpu_check.py --state $OUT --total 8.5 2>&1 | tee -a $OUT/log

After each call, here: cp --no-preserve=mode FILES_AT/* build/gpu-state/ (files_at is in the reply),
then call again: the journals and the built package travel there and the work goes on. A call within
30 s of the last finds its machine warm. Change no source between calls unless a failure makes it
worth while: rows count for the sources that they were measured with (old lines stay in the journal,
and --any-sources lets old rows count). A call that names a part, --part tests, runs that alone. For
the third call `status` says how much is left: lower --total and timeout_s to fit; a case that is
under way at the deadline gets a minute more, then it is killed and tried once again next time.
At the end, here, tables for benchmarks/results: python -m tools.gpu_bench --report build/gpu-state

Without nvcc the CUDA part is left out and Triton serves. In the rehearsal Triton, where it is
installed, is interpreted.

Needs in the Python that runs it: torch (>= 2.11), setuptools, pybind11, cmake, ninja, pytest.
hypothesis, rich and matplotlib are optional. The package goes to build/gpu-check/site: the
environment itself is not changed.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
import gpu_check_build as building
import gpu_check_parts as running
from gpu_check_build import CheckError, has_nvcc

REQUIRED = ("torch", "setuptools", "pybind11", "cmake", "ninja", "pytest")
OPTIONAL = ("triton", "hypothesis", "rich", "matplotlib", "pytest_benchmark")
PARTS = ("build", "smoke", "targets", "tests", "sanitizer", "bench", "ops")
# Minutes that a part takes at most where all are run: the first call shall not end in one of them.
MOST = {"smoke": 2.0, "targets": 6.0}
LEFT = 3


def missing(names: Sequence[str]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def describe_machine(device: str) -> None:
    """Print what is here; raises CheckError when something needed is missing."""
    absent = missing(REQUIRED)
    if absent:
        raise CheckError(
            f"expected {', '.join(REQUIRED)} in {sys.executable}, missing: {', '.join(absent)}"
        )
    import torch

    print(f"python {sys.version.split()[0]}, torch {torch.__version__}, device {device}")
    print(f"optional packages missing: {', '.join(missing(OPTIONAL)) or 'none'}")
    print(f"nvcc: {shutil.which('nvcc') or 'not found'}")
    if not device.startswith("cuda"):
        return
    if not torch.cuda.is_available():
        raise CheckError(
            f"torch {torch.__version__} sees no GPU: install a CUDA build of torch, "
            "or rehearse with --device cpu"
        )
    if not has_nvcc():
        if importlib.util.find_spec("triton") is None:
            raise CheckError(
                "expected nvcc on PATH (or CUDACXX), or triton, to compute on a GPU; found neither"
            )
        print("no nvcc: the CUDA part is not built, Triton serves alone")
    print(f"gpu: {torch.cuda.get_device_name()}, {torch.cuda.get_device_capability()}")


def check(part: str, options: argparse.Namespace, deadline: float) -> running.Outcome:
    """Run one part; what failed and whether cases are left. Raises CheckError."""
    if part == "build":
        building.build(options.device, options.state)
        return running.Outcome([], True)
    if not building.SITE.is_dir():
        raise CheckError(f"expected the built package in {building.SITE}: run --part build")
    if part == "tests":
        return running.tests(options, deadline)
    if part == "sanitizer":
        return running.sanitize(options, deadline)
    return running.benchmark(part, options, deadline)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... or cpu for a rehearsal")
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--part", choices=PARTS, help="one part only; default all, in order")
    parser.add_argument("--minutes", type=float, default=8.0, help="of each part")
    parser.add_argument("--total", type=float, default=math.inf, help="minutes of the call")
    parser.add_argument("--results", type=Path, help="folder for the tables")
    parser.add_argument("--state", type=Path, default=building.WORK / "state")
    parser.add_argument("--jobs", type=int, help="processes of tests; 8 on a GPU")
    parser.add_argument("--again", action="store_true", help="let failed cases run again")
    parser.add_argument("--any-sources", action="store_true", help="rows of old sources count")
    options = parser.parse_args(arguments)
    options.state = options.state.resolve()
    options.state.mkdir(parents=True, exist_ok=True)
    if options.jobs is None:
        options.jobs = 8 if options.device.startswith("cuda") else 1
    return options


def check_parts(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """What failed, a line each, and the parts in which cases are left.

    An error ends its own part; without the package nothing else can run. A part that would begin
    after the call's time is left as it is.
    """
    failures: list[str] = []
    left: list[str] = []
    end = time.monotonic() + 60 * options.total
    for part in [options.part] if options.part else PARTS:
        if time.monotonic() >= end:
            left.append(part)
            continue
        lent = options.device.startswith("cuda") and not options.part
        minutes = min(options.minutes, MOST.get(part, options.minutes) if lent else math.inf)
        try:
            outcome = check(part, options, min(time.monotonic() + 60 * minutes, end))
        except CheckError as error:
            failures.append(f"{part}: {error}")
            if part == "build":
                break
            continue
        failures += outcome.failures
        left += [] if outcome.complete else [part]
    return list(dict.fromkeys(failures)), left  # targets and bench tell of the same rows


def _stopped(number: int, _: object) -> None:
    """The end of a call by SIGTERM (timeout) must end what it has started, as ^C does."""
    sys.exit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 only if every part passed, 3 if cases are left, else 1."""
    options = parsed(arguments)
    start = time.monotonic()
    failures, left = [], []
    try:
        describe_machine(options.device)
        failures, left = check_parts(options)
    except CheckError as error:
        failures = [str(error)]
    seconds = time.monotonic() - start
    for line in failures:
        print(f"FAILED {line}")
    if left:
        print(f"\nCases are left in: {', '.join(left)}. The same command goes on there.")
    if failures:
        print(f"gpu-check FAILED on {options.device} in {seconds:.0f} s: {len(failures)} failures")
        return 1
    if left:
        print(f"gpu-check on {options.device}, {seconds:.0f} s: no failure, and cases are left")
        return LEFT
    print(f"\ngpu-check passed on {options.device} in {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stopped)
    sys.exit(main())
