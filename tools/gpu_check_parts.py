"""The parts of tools/gpu_check.py that go on where they stopped: benchmarks, tests, sanitizer."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpu_check_build import (
    DROP_SOURCE_TREE,
    WORK,
    CheckError,
    check_environment,
    command,
    run_step,
)
from gpu_journal import (
    BUILT,
    DEADLINE,
    FAULT,
    IDENTITY,
    PATH,
    PREFIX,
    ROOT,
    SHARE,
    Journal,
    fingerprint,
    last_of,
)

LEFT, BROKEN = 3, 4  # exit statuses of tools/gpu_bench
GRACE = 60.0  # seconds past the deadline for the case that is under way
TOOLS = str(ROOT / "tools")
PYTEST = (
    DROP_SOURCE_TREE
    + f"sys.path.append({TOOLS!r}); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
)


class Outcome(NamedTuple):
    """What failed in a part, a line each, and whether all of its cases have been run."""

    failures: list[str]
    complete: bool


def identity(options: argparse.Namespace) -> dict[str, Any]:
    """What the results of tests depend on."""
    import torch

    on_gpu = options.device.startswith("cuda")
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "torch": torch.__version__,
        "sources": fingerprint(*BUILT, "tests", "tools"),
    }


def timeout(deadline: float) -> float:
    return max(GRACE, deadline - time.monotonic() + GRACE)


# -- benchmarks ------------------------------------------------------------------------------------


def benchmark(part: str, options: argparse.Namespace, deadline: float) -> Outcome:
    """smoke, targets, bench (all) or ops of tools/gpu_bench. Raises CheckError."""
    environment = check_environment()
    if not options.device.startswith("cuda") and importlib.util.find_spec("triton") is not None:
        environment |= {"TRITON_INTERPRET": "1", "SPARSE_KERNELS_BACKEND": "triton,torch"}
    launcher = DROP_SOURCE_TREE + (
        f"sys.path.append({str(ROOT)!r}); from tools.gpu_bench.__main__ import main; "
        "sys.exit(main())"
    )
    line = command("-c", launcher, "--device", options.device, "--size", options.size)
    line += ["--state", str(options.state), *([] if part == "bench" else ["--part", part])]
    line += ["--any-sources"] if options.any_sources else []
    line += ["--results", str(options.results)] if options.results is not None else []
    if options.again:
        line.append("--again")
    journal = options.state / ("smoke.jsonl" if part == "smoke" else "bench.jsonl")
    while True:
        minutes = max(0.0, (deadline - time.monotonic()) / 60)
        before = _size(journal)
        here = [*line, "--minutes", f"{minutes:.3f}"]
        status = run_step(part, here, environment, timeout(deadline))
        if status == 0:
            return Outcome([], True)
        broke = status == BROKEN or status < 0
        if status == LEFT or (broke and time.monotonic() > deadline):
            return Outcome(failed_rows(journal, part, options.any_sources), False)
        if not broke or _size(journal) == before:
            first = f"{part}: exit status {status}, see its output above"
            return Outcome([first, *failed_rows(journal, part, options.any_sources)], True)
        # What broke the process is in the journal: on with the next case.
        line = [word for word in line if word != "--again"]


def failed_rows(path: Path, part: str, any_sources: bool) -> list[str]:
    """What the journal of a benchmark has noted as failed: an exit status tells of one thing alone.

    targets are rows of bench: both tell of the same ones.
    """
    try:
        journal = last_of(path, ("sources",) if any_sources else ())
    except (FileNotFoundError, ValueError):  # it ended before it began a case
        return []
    if part == "smoke":
        return [f"smoke: {line}" for line in journal.failures()]
    found = [line for line in journal.failures() if not line.startswith(FAULT)]
    return [line for line in found if line.startswith("ops: ") == (part == "ops")]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


# -- tests -----------------------------------------------------------------------------------------

# What `-m gpu` collects lies in these: the others are not looked at.
GPU_TESTS = ("tests",)
REHEARSED = ("tests/test_gpu.py", "tests/test_gpu_streams.py")


def tests(options: argparse.Namespace, deadline: float) -> Outcome:
    """Tests marked `gpu`; in a rehearsal, where they skip, also their twins on the CPU. Raises
    CheckError.
    """
    journal = Journal(options.state / "tests.jsonl", identity(options))
    if options.again:
        journal.forget_failures()
    outcome = _recorded("gpu ", ["-m", "gpu", *GPU_TESTS], journal, options, deadline)
    if not options.device.startswith("cuda"):
        chosen = ["-m", "not slow and not gpu", *REHEARSED]
        twins = _recorded("cpu ", chosen, journal, options, deadline)
        outcome = Outcome(outcome.failures + twins.failures, outcome.complete and twins.complete)
    return outcome


def _recorded(
    prefix: str, chosen: list[str], journal: Journal, options: Any, deadline: float
) -> Outcome:
    """Run what the journal lacks of the tests ``chosen``, anew where a process breaks."""
    while True:
        before = (_count(journal, prefix), sum(journal.begun.values()))
        statuses = _pytest(prefix, chosen, journal, options, deadline)
        journal.reload()
        done, total = _count(journal, prefix), journal.totals.get(prefix)
        print(f"=== tests: {done} of {total} {prefix.strip()} tests are done", flush=True)
        failures = [f"tests: {line}" for line in journal.failures(prefix)]
        if total is not None and done >= total:
            return Outcome(failures, True)
        if time.monotonic() > deadline:
            return Outcome(failures, False)
        if (done, sum(journal.begun.values())) == before:
            raise CheckError(f"no test was run; pytest ended with {statuses}, see above")


def _count(journal: Journal, prefix: str) -> int:
    return sum(key.startswith(prefix) for key in journal.entries)


def _pytest(
    prefix: str, chosen: list[str], journal: Journal, options: Any, deadline: float
) -> list[int]:
    """One process per share of the tests; exit statuses."""
    until = time.time() + deadline - time.monotonic()
    environment = {
        **check_environment(),
        PATH: str(journal.path),
        IDENTITY: json.dumps(journal.identity),
        DEADLINE: str(until),
        PREFIX: prefix,
    }
    line = command("-c", PYTEST, "-p", "no:cacheprovider", "-p", "gpu_recorder", "-q")
    line += ["--continue-on-collection-errors", *chosen]
    print(f"\n=== tests: {options.jobs} x pytest {' '.join(chosen)}", flush=True)
    processes = [
        subprocess.Popen(line, cwd=ROOT, env={**environment, SHARE: f"{index}/{options.jobs}"})
        for index in range(options.jobs)
    ]
    statuses = []
    for process in processes:
        try:
            statuses.append(process.wait(timeout(deadline)))
        except subprocess.TimeoutExpired:
            process.kill()
            statuses.append(process.wait())
    return statuses


# -- compute-sanitizer -----------------------------------------------------------------------------

# Files and how many of their tests are one process, a case. Small launches of every kind of kernel,
# native and Triton; under the tool each takes seconds.
SANITIZED = (
    ("tests/test_gpu.py", 8),
    ("tests/test_gpu_streams.py", 8),
    ("tests/triton_kernels/test_operators.py", 4),
    ("tests/triton_kernels/test_training_step.py", 2),
    ("tests/cuda_emulation/test_kernels_on_gpu.py", 1),
    ("tests/test_torch_ops.py", 16),
)
CHECKS = ("memcheck", "racecheck")
# Without torch's cache of memory nothing can be captured.
NOT_CAPTURED = "not graph and not capture"


def sanitize(options: argparse.Namespace, deadline: float) -> Outcome:
    """compute-sanitizer over the small GPU cases, if there is one. Raises CheckError."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or not options.device.startswith("cuda"):
        why = "is not on PATH (it comes with the CUDA toolkit)" if tool is None else "needs a GPU"
        print(f"\n=== sanitizer: left out, compute-sanitizer {why}", flush=True)
        return Outcome([], True)
    journal = Journal(options.state / "sanitizer.jsonl", identity(options))
    if options.again:
        journal.forget_failures()
    return run_sanitizer(tool, journal, chunks(), deadline)


def chunks() -> list[list[str]]:
    """Names of the tests, those of one process together. Raises CheckError if there are none."""
    found = []
    for file, at_once in SANITIZED:
        names = collected(["-m", "gpu", "-k", NOT_CAPTURED, file])
        found += [names[i : i + at_once] for i in range(0, len(names), at_once)]
    return found


def collected(chosen: Sequence[str]) -> list[str]:
    """Names of tests in pytest's order. Raises CheckError if there are none."""
    line = command("-c", PYTEST, "-p", "no:cacheprovider", "-q", "--collect-only", *chosen)
    done = subprocess.run(
        line, cwd=ROOT, env=check_environment(), check=False, capture_output=True, text=True
    )
    names = [name for name in done.stdout.splitlines() if name.startswith("tests/")]
    if done.returncode or not names:
        raise CheckError(f"pytest collects no tests of {chosen}: {done.stdout}{done.stderr}")
    return names


def run_sanitizer(
    tool: str, journal: Journal, cases: Sequence[Sequence[str]], deadline: float
) -> Outcome:
    """Every case by memcheck, then by racecheck, as far as time allows; a case is a process."""
    # torch's caching allocator would hide a kernel that reads past the end of its tensor.
    environment = {**check_environment(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    log = WORK / "sanitizer.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    keys = {f"{check} {' '.join(case)}": (check, case) for check in CHECKS for case in cases}
    waiting = 0
    for key, (check, case) in keys.items():
        if journal.settled(key):
            continue
        if time.monotonic() > deadline:
            waiting += 1
            continue
        journal.begin(key)
        log.unlink(missing_ok=True)
        line = [tool, "--tool", check, "--target-processes", "all", "--error-exitcode", "9"]
        line += ["--log-file", str(log)]
        line += command("-c", PYTEST, "-p", "no:cacheprovider", "-q", *case)
        status = run_step(f"compute-sanitizer {check}", line, environment, timeout(deadline))
        if status < 0 and time.monotonic() > deadline:
            waiting += 1  # killed for its time; a second time gives it up
        else:
            _note(journal, key, status, log)
    print(f"=== sanitizer: {len(keys) - waiting} of {len(keys)} cases are done", flush=True)
    return Outcome([f"sanitizer: {line}" for line in journal.failures()], waiting == 0)


def _note(journal: Journal, key: str, status: int, log: Path) -> None:
    if status == 0:
        journal.finish(key, "passed")
        return
    text = log.read_text(errors="replace") if log.is_file() else ""
    print(text[:4000], flush=True)
    first = os.linesep.join(text.splitlines()[:12])
    journal.finish(key, "failed", why=f"exit status {status}: {first}"[:1500])
