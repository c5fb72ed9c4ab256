"""Compiles every configuration of the Triton kernels for real chips, without a GPU, and judges it.

    python tests/triton_kernels/compile_table.py --minutes 3         # as often as it takes
    python tests/triton_kernels/compile_table.py --table docs/gpu-compile.md

Each row of the journal (build/triton-compile.jsonl) is one compilation; a second run goes on where
the first one stopped. The table replaces what stands between the two markers in the document. Needs
triton (its package brings ptxas and cuobjdump) and sparse_kernels (installed, or PYTHONPATH=.), no
GPU. A row fails if it uses local memory, more shared memory than the chip has, no tensor core where
one is claimed, or one where strict float32 was asked for.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import vector_compile
from machine_code import compile_launch, processor_seconds

from sparse_kernels.backends.triton import block_config as tiles
from sparse_kernels.geometry import Conv2dGeometry

BLOCKS = ((16, 16), (32, 32), (64, 64), (128, 128), (16, 32), (64, 16))
ARCHITECTURES = (80, 90, 100)
PRECISIONS = {
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
}
OPERATORS = (
    "conv2d",
    "conv2d_dgrad",
    "conv2d_wgrad",
    "linear",
    "linear_dgrad",
    "linear_wgrad",
)
#: Where the tables stand in the document: of blocks, and of elements and V x 1 blocks.
MARKERS = {False: "compile-table", True: "vector-table"}


class Case(NamedTuple):
    """One compilation."""

    op: str
    precision: str
    block: tuple[int, int]
    config: tuple[Any, ...]
    arch: int
    shape: str = "even"  # or "odd": channels (of V x 1: a batch) that no vector load divides

    @property
    def vector(self) -> bool:
        """Whether the kernels are those of elements and V x 1 blocks."""
        return self.block[1] == 1

    @property
    def tensor_cores(self) -> bool:
        """Whether the products are claimed to run on the tensor cores."""
        return self.precision != "fp32" and (not self.vector or bool(self.config[2]))

    @property
    def key(self) -> str:
        """Name in the journal."""
        bh, bw = self.block
        config = "-".join(str(int(part)) for part in self.config)
        return f"{self.op} {self.precision} {bh}x{bw} {config} sm_{self.arch} {self.shape}"


def problem(
    op: str, precision: str, block: tuple[int, int], points: int = 1 << 15
) -> tiles.Problem:
    """A problem of the class; by default a large one, with full tiles."""
    dtype, tf32 = PRECISIONS[precision]
    return tiles.Problem(op, dtype, block, points, tf32)


def every_case() -> list[Case]:
    """All cases, those that matter most first: a run that is cut short has done these."""
    return list(dict.fromkeys(_cases()))


def _cases() -> Iterator[Case]:
    vectors = list(vector_compile.rows(PRECISIONS))
    yield from _block_cases(default=True)
    yield from _vector_cases(vectors, default=True)
    yield from _block_cases(default=False)
    yield from _other_block_cases()
    yield from _vector_cases(vectors, default=False)


def _block_cases(default: bool) -> Iterator[Case]:
    """Large problems: the default of every class, or what else may be chosen."""
    for op in OPERATORS[:3]:
        for precision in ("bf16", "tf32", "fp32"):
            for block in BLOCKS:
                found = tiles.candidates(problem(op, precision, block))
                for config in found[:1] if default else found[1:]:
                    for arch in ARCHITECTURES:
                        yield Case(op, precision, block, tuple(config), arch)


def _other_block_cases() -> Iterator[Case]:
    # Few points: smaller tiles.
    for points in (16, 64, 32):
        for op in OPERATORS[:2]:
            for precision in ("bf16", "tf32", "fp32"):
                for block in BLOCKS:
                    config = tiles.candidates(problem(op, precision, block, points))[0]
                    for arch in ARCHITECTURES:
                        yield Case(op, precision, block, tuple(config), arch)
    # What differs in the kernel from the cases above, by default configuration.
    for op, precision, shape in (
        *((op, "bf16", "even") for op in OPERATORS[3:]),
        *((op, "fp16", "even") for op in OPERATORS[:3]),
        *((op, "bf16", "odd") for op in OPERATORS[:3]),
    ):
        for block in BLOCKS:
            config = tiles.candidates(problem(op, precision, block))[0]
            yield Case(op, precision, block, tuple(config), 90, shape)


def _vector_cases(rows: Iterable[vector_compile.Row], default: bool) -> Iterator[Case]:
    for op, precision, side, vector, shape, first in rows:
        if first == default:
            for arch in ARCHITECTURES if shape == "even" else (90,):
                yield Case(op, precision, (side, 1), tuple(vector), arch, shape)


def launch_of(case: Case) -> Any:
    """The launch of a case, made by the launchers themselves from tensors without memory."""
    from sparse_kernels.backends.triton import block_products, block_wgrad

    dtype, tf32 = PRECISIONS[case.precision]
    backends: Any = torch.backends
    for holder in (backends.cuda.matmul, backends.cudnn.conv):
        holder.fp32_precision = "tf32" if tf32 else "ieee"
    if case.vector:
        return vector_compile.launch(
            case.op, dtype, tf32, case.block[0], case.config, case.shape == "odd"
        )
    channels = 512 if case.shape == "even" else 509
    spatial = case.op.startswith("conv2d")
    pixels = (16, 16) if spatial else ()
    kernel = (3, 3, 1, 1, 1, 1, 1, 1) if spatial else (1, 1)
    g = Conv2dGeometry(channels, channels, *kernel)
    images = torch.empty((128, channels, *pixels), dtype=dtype, device="meta")
    bh, bw = case.block
    rows, cols = -(-channels // bh), g.taps * -(-channels // bw)
    capacity = rows * cols // 20
    values = torch.empty((capacity, bh, bw), device="meta")
    crow, t_crow = (torch.empty(n + 1, dtype=torch.int32, device="meta") for n in (rows, cols))
    list_ = torch.empty(capacity, dtype=torch.int32, device="meta")
    index = (crow, list_, t_crow, list_, list_)
    if case.op.endswith("_wgrad"):
        config = tiles.WgradConfig(*case.config)
        p = problem(case.op, case.precision, case.block)
        parts = torch.empty((4, *values.shape), device="meta")
        return block_wgrad.wgrad_launch(p, parts, images, images, crow, list_, g, config)
    if case.op.endswith("_dgrad"):
        lists, _ = block_products.transposed_lists(index, g, case.block)
        bias = None
    else:
        lists = block_products.forward_lists(index)
        bias = torch.empty(channels, device="meta")
    config = tiles.ProductConfig(*case.config)
    return block_products.product_launch(
        case.op, images, images, values, bias, lists, g, bias is not None, config
    )


def compile_case(case: Case) -> dict[str, Any]:
    """Compile a case; what its machine code uses, and what is wrong with that."""
    import triton

    start = processor_seconds()
    found = compile_launch(launch_of(case), case.arch)
    seconds = processor_seconds() - start
    found.update(key=case.key, triton=triton.__version__, seconds=round(seconds, 1))
    found["faults"] = faults_of(case, found)
    return found


def faults_of(case: Case, found: dict[str, Any]) -> list[str]:
    """What makes a row fail; empty if nothing does."""
    faults = []
    if found["local"] or found["spills"]:
        faults.append(f"local memory: {found['local']} bytes, {found['spills']} accesses")
    if found["shared"] > tiles.SHARED_LIMIT[case.arch]:
        faults.append(f"shared memory {found['shared']} > {tiles.SHARED_LIMIT[case.arch]}")
    if found["scratch"]:
        faults.append(f"{found['scratch']} bytes of global scratch")
    if not case.tensor_cores and found["tensor"]:
        faults.append(f"tensor cores {found['tensor']} where none should be")
    if not case.tensor_cores and not found["ffma"] + found["mixed"] + found["apart"]:
        faults.append("no FFMA, FHFMA or FMUL2")
    if case.precision == "fp32" and found["mixed"]:
        faults.append(f"{found['mixed']} products of 16-bit factors in strict float32")
    if case.tensor_cores and not found["tensor"]:
        faults.append("no tensor-core instruction")
    return faults


# -- journal and table -----------------------------------------------------------------------------


def read_journal(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows by (Triton version, key); a later row replaces an earlier one."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines() if line]
    return {(row["triton"], row["key"]): row for row in rows}


def compile_missing(path: Path, seconds: float, only: str) -> int:
    """Compile what the journal lacks until the time is over; returns how many still lack."""
    import triton

    end = time.monotonic() + seconds
    done = read_journal(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    missing = [c for c in every_case() if (triton.__version__, c.key) not in done]
    missing = [case for case in missing if re.search(only, case.key)]
    while missing and time.monotonic() < end:
        row = compile_case(missing.pop(0))
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if row["faults"]:
            print(f"FAULT {row['key']}: {'; '.join(row['faults'])}", flush=True)
    return len(missing)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line per kernel and configuration, a column per chip."""
    chips = [f"sm_{arch}" for arch in ARCHITECTURES]
    lines = [
        f"| kernel | precision | block | configuration | shape | triton | {' | '.join(chips)} |",
        "|" + "---|" * (6 + len(chips)),
    ]
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        op, precision, block, config, chip, shape = row["key"].split()
        line = (op, precision, block, config, shape, row["triton"])
        cells.setdefault(line, {})[chip] = cell(row)
    for line, found in cells.items():
        lines.append(f"| {' | '.join((*line, *(found.get(chip, '') for chip in chips)))} |")
    return "\n".join(lines)


def cell(row: dict[str, Any]) -> str:
    """Registers, shared memory and the products' instructions of a compilation, or its faults."""
    if row["faults"]:
        return f"FAULT: {'; '.join(row['faults'])}"
    counts = row["tensor"] or {
        "FFMA": row["ffma"],
        "FHFMA": row.get("mixed", 0),
        "FMUL2": 0 if row["ffma"] else row.get("apart", 0),
    }
    products = ", ".join(f"{n} {name}" for name, n in sorted(counts.items()) if n)
    return f"{row['registers']} r, {row['shared'] / 1024:.0f} KB, {products}"


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace the parts of a document between the markers, a table without rows excepted."""
    kinds = {case.key: case.vector for case in every_case()}  # the journal may know others
    for kind, name in MARKERS.items():
        own = [row for row in rows if kinds.get(row["key"]) == kind]
        exist = sum(case.vector == kind for case in every_case())
        if own:
            replace_part(path, name, f"{summary(own, exist)}\n\n{table(own)}")


def summary(rows: list[dict[str, Any]], exist: int) -> str:
    """How many were compiled, by which Triton, with what success."""
    faulty = sum(bool(row["faults"]) for row in rows)
    versions = sorted(Counter(row["triton"] for row in rows).items())
    by_version = ", ".join(f"{n} of {exist} cases with Triton {v}" for v, n in versions)
    return f"{len(rows)} compilations ({by_version}), {faulty} with faults."


def replace_part(path: Path, name: str, new: str) -> None:
    """Put ``new`` between the markers ``name`` of a document."""
    text = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if begin not in text or end not in text:
        raise ValueError(f"{path}: expected the markers {begin} and {end}, found none")
    before, after = text.split(begin)[0], text.split(end)[1]
    path.write_text(f"{before}{begin}\n{new}\n{end}{after}", encoding="utf-8")


def main() -> int:
    """Returns 1 if a row has a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--journal", type=Path, default=Path("build/triton-compile.jsonl"))
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--only", default="", help="regular expression on a case's key")
    parser.add_argument("--table", type=Path, help="document whose table is replaced")
    options = parser.parse_args()
    if options.minutes:
        left = compile_missing(options.journal, options.minutes * 60, options.only)
        print(f"{left} cases are left")
    keys = {case.key for case in every_case()}
    rows = [row for row in read_journal(options.journal).values() if row["key"] in keys]
    rows.sort(key=lambda row: (row["triton"], row["key"]))
    if options.table:
        write_table(options.table, rows)
    faulty = [row for row in rows if row["faults"]]
    print(f"{len(rows)} rows, {len(faulty)} with faults")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
