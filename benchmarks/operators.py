"""Time every operator against dense PyTorch; write a CSV and a Markdown table with the machine's
header.

python benchmarks/operators.py --device cpu --size full --density 0.05 --out benchmarks/results/NAME
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from problems import (
    BATCH,
    OPERATORS,
    SHAPES,
    SMALL_BATCH,
    SMALL_SHAPES,
    Problem,
    backend_for,
    problems,
)
from timing import Timing, machine_name, time_interleaved

from sparse_kernels.workbench.machine import header

BLOCKS = ((1, 1), (4, 1))
COLUMNS = (
    "operator", "shape", "batch", "backend", "block", "density", "dtype",
    "sparse_ms", "sparse_q1_ms", "sparse_q3_ms", "gflops", "dense_equivalent_gflops",
    "dense_ms", "dense_best", "speedup", "error",
)  # fmt: skip


def row(problem: Problem, timings: dict[str, Timing], backend: str) -> dict[str, object]:
    """One line of the results; the dense baseline is the fastest dense contender."""
    sparse = timings["sparse"]
    best = min(
        (name for name in timings if name != "sparse"), key=lambda name: timings[name].median
    )
    return {
        "operator": problem.operator,
        "shape": problem.shape.name,
        "batch": problem.batch,
        "backend": backend,
        "block": f"{problem.block[0]}x{problem.block[1]}",
        "density": problem.density,
        "dtype": "float32",
        "sparse_ms": f"{sparse.median * 1e3:.4g}",
        "sparse_q1_ms": f"{sparse.low * 1e3:.4g}",
        "sparse_q3_ms": f"{sparse.high * 1e3:.4g}",
        "gflops": f"{problem.flops / sparse.median / 1e9:.4g}",
        "dense_equivalent_gflops": f"{problem.dense_flops / sparse.median / 1e9:.4g}",
        "dense_ms": f"{timings[best].median * 1e3:.4g}",
        "dense_best": best,
        "speedup": f"{timings[best].median / sparse.median:.2f}",
        "error": f"{problem.error:.1e}",
    }


def write_results(folder: Path, facts: dict[str, object], rows: list[dict[str, object]]) -> None:
    """`operators.csv` (rows only, for programs) and `operators.md` (header and table, for
    people).
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "operators.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    shown = [
        name for name in COLUMNS if name not in ("sparse_q1_ms", "sparse_q3_ms", "backend", "dtype")
    ]
    lines = ["# Operators", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    lines += ["", "| " + " | ".join(shown) + " |", "|" + "---|" * len(shown)]
    lines += ["| " + " | ".join(str(line[name]) for name in shown) + " |" for line in rows]
    (folder / "operators.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="folder for operators.csv and operators.md")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status; a wrong operator ends the run with an error."""
    options = parse_arguments(arguments)
    device = torch.device(options.device)
    facts = header() | {"command": " ".join(["python", *sys.argv])}
    small = options.size == "small"
    shapes, batch = (SMALL_SHAPES, SMALL_BATCH) if small else (SHAPES, BATCH)
    backend = backend_for(device).__name__.rsplit(".", 1)[-1]
    for name, value in facts.items():
        print(f"{name}: {value}")
    rows = []
    for block in BLOCKS:
        for problem in problems(
            shapes, batch, options.density, block, device, tuple(options.operators)
        ):
            timings = time_interleaved(
                problem.contenders, device, 2 if small else options.rounds, 0.001 if small else 0.1
            )
            rows.append(row(problem, timings, backend))
            line = rows[-1]
            print(
                f"{problem.label:42s} {line['sparse_ms']:>9s} ms  dense {line['dense_ms']:>9s} ms  "
                f"{line['speedup']:>6s}x  {line['gflops']:>7s} GFLOP/s",
                flush=True,
            )
    if not rows:
        print(f"no operator of backend {backend} runs on {device}: nothing was timed")
        return 1
    folder = options.out or Path(__file__).parent / "results" / machine_name(device)
    write_results(folder, facts, rows)
    print(f"{len(rows)} rows in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
