"""Time layers and whole training steps on a GPU against dense, torch BSR and cuSPARSE.

    python -m tools.gpu_bench                      # all parts, 8 minutes; again until it says done
    python -m tools.gpu_bench --part products --minutes 5
    python -m tools.gpu_bench --device cpu --size small      # the rehearsal

GPU time of replayed CUDA graphs. A row that is finished is on disk; the same command goes on from
there. Exit status: 0 done, 3 time is up and rows are left, 1 an error.
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
LEFT = 3  # exit status: run the same command again


def correct_interpreter() -> None:
    """The rehearsal on Triton's interpreter needs the same corrections as the tests."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.path.insert(0, str(ROOT / "tests" / "triton_kernels"))
        from interpreter_support import correct_interpreter as correct  # type: ignore

        correct()


def parts() -> dict[str, Callable[[Any], Iterator[Any]]]:
    """The parts by name, in the order in which they are run."""
    from tools.gpu_bench import layers, steps

    return {
        "products": layers.products,
        "steps": steps.steps,
        "vgg": layers.convolutions("vgg"),
        "wrn": layers.convolutions("wrn"),
        "resnet": layers.convolutions("resnet"),
    }


def run(part: str, options: argparse.Namespace, deadline: float) -> bool:
    """One part as far as time allows, published in any case; whether it is complete."""
    import torch

    from sparse_kernels.workbench.bench import results
    from tools.gpu_bench.layers import Settings

    device = torch.device(options.device)
    settings = Settings(options.size == "small", device, options.rounds)
    folder = options.results or ROOT / "benchmarks/results" / results.machine_folder(device)
    name = f"gpu-{part}" + ("-small" if settings.small else "")
    # Kept when the part is complete: the same command repeats nothing; `make clean` starts anew.
    path = options.journals / f"{name}-{device.type}.jsonl"
    journal = results.Journal(path, {"part": part, "rounds": options.rounds})
    left = 0
    for key, make in parts()[part](settings):
        if key not in journal.rows and time.monotonic() > deadline:
            left += 1
            continue
        row = journal.row(key, make)
        print(f"{key}: {summary(row)}", flush=True)
    found = {
        "machine": journal.header,
        "command": f"python -m tools.gpu_bench --part {part} --device {options.device}",
        "complete": left == 0,
        "rows": list(journal.rows.values()),
    }
    files, _ = results.publish(folder, name, found, table(part, found), [])
    print(f"{part}: {len(journal.rows)} rows, {left} left; {files[1]}", flush=True)
    return left == 0


def summary(row: dict[str, Any]) -> str:
    """The speedups of a row's training pass, or why there are none."""
    found = row["training"]
    if "why" in found:
        return f"missing: {found['why']}"
    cells = [f"{name} {value:.2f}x" for name, value in found["speedups"].items()]
    cells += [f"{name} MISSING ({why})" for name, why in found["missing"].items()]
    return f"best dense: {found['dense_best']}; {', '.join(cells)}"


def table(part: str, found: dict[str, Any]) -> str:
    """Markdown: a line per row, pass and contender."""
    from sparse_kernels.workbench import machine
    from sparse_kernels.workbench.bench.results import markdown, milliseconds

    lines: list[list[str]] = []
    missing: list[str] = []
    for row in found["rows"]:
        for which in ("forward", "training"):
            entry = row.get(which)
            if entry is None or "why" in entry:
                missing += [f"{row['shape']} {row['precision']}: {entry['why']}"] if entry else []
                continue
            best = entry["dense_best"]
            for name, timing in entry["timings"].items():
                gain = entry["speedups"].get(name)
                if gain is None and name != best:
                    continue
                lines.append([
                    row["shape"], row["precision"], which, name.removesuffix(" forward"),
                    milliseconds(timing), f"{gain:.2f}x" if gain else "best dense",
                ])  # fmt: skip
            missing += [
                f"{row['shape']} {row['precision']} {n}: {w}" for n, w in entry["missing"].items()
            ]
    head = ["layer or net", "precision", "pass", "contender", "ms", "speedup"]
    state = "" if found["complete"] else " NOT COMPLETE: rows are left."
    header = found["machine"]
    return "\n".join([
        f"GPU part {part}: milliseconds of replayed CUDA graphs, median [quartiles].{state}",
        f"GPU {header['gpu']}; {machine.one_line(header)}",
        "",
        *markdown(head, lines, left=4),
        "",
        *(f"Missing: {line}." for line in missing),
    ])  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--part", choices=("products", "steps", "vgg", "wrn", "resnet"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--minutes", type=float, default=8.0, help="no row begins after these")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--results", type=Path, help="folder for the results")
    parser.add_argument("--journals", type=Path, default=ROOT / "build" / "gpu-bench")
    options = parser.parse_args(arguments)
    correct_interpreter()
    deadline = time.monotonic() + 60 * options.minutes
    done = [run(part, options, deadline) for part in ([options.part] if options.part else parts())]
    return 0 if all(done) else LEFT


if __name__ == "__main__":
    sys.exit(main())
