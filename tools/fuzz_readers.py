"""Fuzz every reader of files (idx, CIFAR, checkpoint, plan cache, configuration) for a given time.

    python tools/fuzz_readers.py --seconds 600              all readers, one after the other
    python tools/fuzz_readers.py tensors --seconds 60       one of them

With the package `atheris` (pip install atheris) coverage guides the inputs; without it they are
plain random mutations, and the line printed says so. Inputs worth keeping lie in
build/fuzz/<reader>/; a finding is written to build/fuzz/<reader>-finding-<digest> and ends the run
with status 1. Prints one line per reader: engine, executions, findings.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
CORPUS = ROOT / "build" / "fuzz"
NAMES = ("idx", "cifar", "manifest", "manifest-rehashed", "state-json", "training-state",
         "tensors", "plan-cache", "configuration")  # fmt: skip


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


def one(name: str, seconds: int) -> bool:
    """Fuzz one reader in a process of its own and print its line; whether nothing was found."""
    command = [sys.executable, "-W", "ignore", __file__, name, "--child", "--seconds", str(seconds)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    text = result.stdout + result.stderr
    found = re.findall(r"(?:number_of_executed_units:|executions:|Done) *(\d+)", text)
    engine = "coverage-guided" if "INFO: Running with entropic" in text else "plain mutation"
    executions = found[-1] if found else "?"
    good = result.returncode == 0
    print(f"{name}: {engine}, {executions} executions, {'0 findings' if good else 'A FINDING'}")
    if not good:
        print(text[-4000:])
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reader", nargs="?", choices=NAMES, help="default: all")
    parser.add_argument("--seconds", type=int, default=60, help="per reader")
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
    good = [one(name, args.seconds) for name in ([args.reader] if args.reader else NAMES)]
    sys.exit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
