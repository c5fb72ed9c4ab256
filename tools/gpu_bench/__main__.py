"""Time layers and whole training steps on a GPU against dense, torch BSR and cuSPARSE.

    python -m tools.gpu_bench                # all but ops, 8 minutes; again until it says done
    python -m tools.gpu_bench --part smoke         # no times: every operator against float64
    python -m tools.gpu_bench --part targets       # the rows of the issues' targets, best first
    python -m tools.gpu_bench --part products --minutes 5
    python -m tools.gpu_bench --device cpu --size small      # the rehearsal
    python -m tools.gpu_bench --report FOLDER      # tables of what a GPU machine sent back

GPU time of replayed CUDA graphs. A row that is finished is in the journal <state>/bench.jsonl
(smoke.jsonl); the same command goes on from there, on the same GPU with the same sources, and
--any-sources takes over rows of other sources too (a table names them). Contenders that break the
CUDA context are noted, and left out when the row is tried again. Exit status: 0 done, 3 time is
up and rows are left (lines FAILED say what failed), 4 the CUDA context broke: run the same command
again; 1 an error.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
LEFT, BROKEN = 3, 4
SMOKE, TARGETS = "smoke", "targets"
OF_PARTS = ("elements", "products", "update", "steps", "vgg", "wrn", "resnet", "tuned", "ops")
PARTS = (SMOKE, TARGETS, *OF_PARTS)


def correct_interpreter() -> None:
    """The rehearsal on Triton's interpreter needs the same corrections as the tests."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.path.insert(0, str(ROOT / "tests" / "triton_kernels"))
        from interpreter_support import correct_interpreter as correct  # type: ignore

        correct()


def parts() -> dict[str, Callable[[Any], Iterator[Any]]]:
    """The parts that time something, by name."""
    from tools.gpu_bench import elements, layers, operators, steps, tuned, update

    return {
        "elements": elements.elements,
        "products": layers.products,
        "update": update.updates,
        "steps": steps.steps,
        "vgg": layers.convolutions("vgg"),
        "wrn": layers.convolutions("wrn"),
        "resnet": layers.convolutions("resnet"),
        "tuned": tuned.tuned,
        "ops": operators.operators,
    }


# Rows of the targets of issues 4 and 5, the most telling first: parts of keys, "part: key".
ORDER = (
    "elements: linear-4096 bf16 5% 32x1",
    "elements: linear-4096 fp32 5% 1x1",
    "products: product-4096 bf16",
    "update: update 10% 1x1 exact",
    "steps: step vgg16-d bf16",
    "steps: step wide-mlp bf16",
    "vgg: vgg-256-256-8 bf16",
    "elements: linear-4096 fp32 10% 1x1",
    "elements: linear-4096 fp32 2% 1x1",
    "elements: conv-256-14 fp32 5% 1x1",
    "steps: step transformer bf16",
    "steps: step wrn-16-8 bf16",
    "tuned: tuned product-4096 bf16 5% 32x32",
    "products: product-4096 tf32",
    "wrn: wrn-128-128-32-3x3 bf16",
    "vgg: vgg-512-512-4 bf16",
    "elements: linear-4096 fp32 15% 1x1",
    "elements: conv-256-14 bf16 5% 32x1",
    "update: update 10% 16x16 exact",
    "tuned: tuned product-4096 bf16 5% 64x64",
    "tuned: tuned vgg-256-256-8 bf16 5% 32x32",
)


def tasks(part: str, settings: Any) -> list[tuple[str, Callable[[], Any]]]:
    """("part: key", what makes the row) in the order of running."""
    chosen = parts()
    if part != TARGETS:
        return [(f"{part}: {key}", make) for key, make in chosen[part](settings)]
    known = dict(found for name in chosen for found in tasks(name, settings))
    if settings.small:  # other names there: a row of every part
        first = {key.partition(":")[0]: key for key in reversed(known)}
        return [(first[name], known[first[name]]) for name in chosen if name in first]
    return [(key, known[key]) for key in ORDER]


def run(part: str, options: argparse.Namespace, deadline: float) -> int:
    """One part as far as time allows; the exit status."""
    import torch

    from tools.gpu_bench import report, state
    from tools.gpu_bench.layers import Settings

    device = torch.device(options.device)
    settings = Settings(options.size == "small", device, options.rounds)
    journal = state.open_journal(options, device, "bench")
    left, todo = 0, tasks(part, settings)
    if part != TARGETS:
        journal.count(f"{part}: ", len(todo))
    for key, make in todo:
        if journal.settled(key):
            continue
        if time.monotonic() > deadline:
            left += 1
            continue
        settings.faults = state.faults(journal, key)
        began = time.monotonic()
        if not state.carry_out(journal, key, make):
            return BROKEN
        entry = journal.entries[key]
        print(f"{key}: {report.summary(entry)} ({time.monotonic() - began:.0f} s)", flush=True)
    if not options.no_tables:
        report.publish(journal, options, device)
    failed = [line for key, _ in todo for line in journal.failures(key)]
    for line in failed:
        print(f"FAILED {line}")
    print(f"{part}: {left} rows left", flush=True)
    return LEFT if left else int(bool(failed))


def smoke(options: argparse.Namespace, deadline: float) -> int:
    """Every operator against float64; the exit status: 1 if one is wrong."""
    import torch

    from tools.gpu_bench import smoke as cases
    from tools.gpu_bench import state

    device = torch.device(options.device)
    journal = state.open_journal(options, device, SMOKE)
    left = 0
    for key, check in cases.cases(device, options.size == "small"):
        if journal.settled(key):
            continue
        if time.monotonic() > deadline:
            left += 1
        elif not state.carry_out(
            journal, key, lambda check=check: {"error": check()}, cases.NotServed
        ):  # type: ignore[misc]
            return BROKEN
    count = {kind: 0 for kind in ("passed", "skipped", "failed")}
    for entry in journal.entries.values():
        count[entry.outcome] += 1
    for line in journal.failures():
        print(f"FAILED {line}")
    print(f"smoke: {count}, {left} left (skipped: no kernel of that backend)", flush=True)
    return LEFT if left else int(count["failed"] > 0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--minutes", type=float, default=8.0, help="no row begins after these")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path, help="folder for the tables")
    parser.add_argument("--no-tables", action="store_true", help="rows go to the journal alone")
    parser.add_argument("--state", type=Path, default=ROOT / "build" / "gpu-check" / "state")
    parser.add_argument("--any-sources", action="store_true", help="rows of other sources count")
    parser.add_argument("--again", action="store_true", help="let failed cases run again")
    parser.add_argument("--report", type=Path, help="write tables of the journal in this folder")
    options = parser.parse_args(arguments)
    if options.report is not None:
        from tools.gpu_bench import report

        report.from_folder(options.report, options.results)
        return 0
    correct_interpreter()
    deadline = time.monotonic() + 60 * options.minutes
    if options.part == SMOKE:
        return smoke(options, deadline)
    statuses = []
    for part in [options.part] if options.part else OF_PARTS[:-1]:
        statuses.append(run(part, options, deadline))
        if statuses[-1] == BROKEN:
            return BROKEN
    return LEFT if LEFT in statuses else max(statuses)


if __name__ == "__main__":
    sys.exit(main())
