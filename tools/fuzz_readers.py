"""Fuzz every reader of files (idx, CIFAR, checkpoint, plan cache, configuration) for a given time.

    python tools/fuzz_readers.py --seconds 600              all readers, one after the other
    python tools/fuzz_readers.py tensors --seconds 60       one of them
    python tools/fuzz_readers.py --seconds 120 --executions 10000000 --minutes 90
                                                            rounds over all, until so many in all

With the package `atheris` (pip install atheris) coverage guides the inputs; without it they are
plain random mutations, and the line printed says so. Inputs worth keeping lie in
build/fuzz/<reader>/, where the next run goes on from them; a finding is written to
build/fuzz/<reader>-finding-<digest> and ends the run with status 1. Prints one line per reader:
engine, executions, findings. Each line is kept in build/fuzz/record.jsonl with a digest of the
readers' sources: executions of other sources do not count towards --executions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
CORPUS = ROOT / "build" / "fuzz"
NAMES = ("idx", "cifar", "manifest", "manifest-rehashed", "state-json", "training-state",
         "tensors", "plan-cache", "configuration")  # fmt: skip
#: What the targets run; a change of anything else says nothing about their executions.
SOURCES = ("tests/reader_targets.py", "sparse_kernels/*.py", "sparse_kernels/nn/*.py",
           "sparse_kernels/training/*.py", "sparse_kernels/workbench/formats.py",
           "sparse_kernels/workbench/config.py", "sparse_kernels/workbench/errors.py")  # fmt: skip


def guided(name: str, seconds: int) -> None:
    """libFuzzer's loop in this process; it never returns."""
    import atheris
    import torch

    torch.set_num_threads(1)
    with atheris.instrument_imports(include=["sparse_kernels", "safetensors", "json"]):
        from reader_targets import TARGETS
    target, seeds = TARGETS[name]
    corpus = CORPUS / name
    corpus.mkdir(parents=True, exist_ok=True)
    for at, seed in enumerate(seeds):
        (corpus / f"seed-{at}").write_bytes(seed)
    finding = f"-artifact_prefix={CORPUS / name}-finding-"
    limits = [f"-max_total_time={seconds}", "-rss_limit_mb=8192", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *limits, finding, str(corpus)], target)
    atheris.Fuzz()


def plain(name: str, seconds: int) -> int:
    """Random mutations of the seeds; the number of executions, or exits with the finding."""
    from reader_targets import TARGETS, digest
    from test_fuzz_readers import mutated

    target, seeds = TARGETS[name]
    rng, end, count = random.Random(), time.monotonic() + seconds, 0
    while time.monotonic() < end:
        data = mutated(rng.choice(seeds), rng)
        count += 1
        try:
            target(data)
        except Exception:
            CORPUS.mkdir(parents=True, exist_ok=True)
            (CORPUS / f"{name}-finding-{digest(data)}").write_bytes(data)
            traceback.print_exc()
            sys.exit(1)
    return count


def sources() -> str:
    """Digest of the readers' sources and of what the targets ask of them."""
    found = [path for pattern in SOURCES for path in sorted(ROOT.glob(pattern))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in found)).hexdigest()[:12]


def recorded(record: Path, code: str) -> Counter[str]:
    """Executions per reader that `record` holds of sources `code`, coverage-guided or not."""
    lines = record.read_text().splitlines() if record.exists() else []
    count: Counter[str] = Counter()
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # cut off by a kill: its executions do not count
            continue
        if entry["sources"] == code:
            count[entry["reader"]] += entry["executions"]
    return count


def one(name: str, seconds: int, record: Path) -> bool:
    """Fuzz one reader in a process of its own; print and record it. Whether nothing was found."""
    command = [sys.executable, "-W", "ignore", __file__, name, "--child", "--seconds", str(seconds)]
    code = sources()
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    text = result.stdout + result.stderr
    found = re.findall(r"(?:number_of_executed_units:|executions:|Done) *(\d+)", text)
    engine = "coverage-guided" if "INFO: Running with entropic" in text else "plain mutation"
    executions = int(found[-1]) if found else 0
    good = result.returncode == 0
    print(f"{name}: {engine}, {executions} executions, {'0 findings' if good else 'A FINDING'}",
          flush=True)  # fmt: skip
    if not good:
        print(text[-4000:], flush=True)
    entry = {"time": time.strftime("%F %T"), "sources": code, "reader": name, "engine": engine,
             "executions": executions, "finding": not good}  # fmt: skip
    record.parent.mkdir(parents=True, exist_ok=True)
    with record.open("a") as file:
        file.write(json.dumps(entry) + "\n")
    return good


def rounds(readers: list[str], seconds: int, executions: int, minutes: float, record: Path) -> bool:
    """One round over the readers, or as many as it takes; False at the first finding."""
    end = time.monotonic() + 60 * minutes
    while True:
        good = []
        for name in readers:
            if time.monotonic() < end:
                good.append(one(name, seconds, record))
        count = recorded(record, sources())
        print(f"{count.total()} executions of these sources: {dict(count)}", flush=True)
        if not all(good):
            return False
        if count.total() >= executions or time.monotonic() > end:
            return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reader", nargs="?", choices=NAMES, help="default: all")
    parser.add_argument("--seconds", type=int, default=60, help="per reader and round")
    parser.add_argument("--executions", type=int, default=0, help="rounds until so many in all")
    parser.add_argument("--minutes", type=float, default=600, help="but nothing new after these")
    parser.add_argument("--record", type=Path, default=CORPUS / "record.jsonl")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        try:
            import atheris  # noqa: F401
        except ImportError:
            print(f"executions: {plain(args.reader, args.seconds)}")
        else:
            guided(args.reader, args.seconds)
        return
    readers = [args.reader] if args.reader else list(NAMES)
    good = rounds(readers, args.seconds, args.executions, args.minutes, args.record)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
