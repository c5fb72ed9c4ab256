"""Expected times of the Triton kernels on an H100, from bytes and FLOPs alone.

    python tools/gpu_roofline.py docs/gpu.md      # replaces the tables between the markers there

A model, not a measurement: each kernel takes as long as the slowest of its arithmetic, its traffic
between L2 and the multiprocessors, and its traffic to memory, and never less than a launch. The
traffic follows from the default tiles, read from the package. No GPU and no triton needed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from sparse_kernels.backends.triton import block_config as tiles
from sparse_kernels.backends.triton import vector_config

# H100 SXM, from NVIDIA's data sheet (dense figures); the L2 figure is the one in docs/gpu.md.
PEAK = {"bf16": 989e12, "tf32": 495e12, "fp32": 67e12}
L2_BYTES_PER_SECOND = 5.5e12
MEMORY_BYTES_PER_SECOND = 3.35e12
LAUNCH_SECONDS = 2.5e-6
# A multiprocessor reads 32 words a clock from shared memory, and multiplies and adds 128 at a time.
SHARED_BYTES_PER_SECOND = PEAK["fp32"] / 2 / 128 * 32 * 4
DENSE_SHARE_OF_PEAK = 0.75  # what cuBLAS and cuDNN are assumed to reach
DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp32": torch.float32}


class Layer(NamedTuple):
    """A layer; `points` are rows of the batch or output pixels, `taps` is 1 for linear."""

    name: str
    points: int
    outputs: int
    inputs: int
    taps: int = 1


LAYERS = (
    Layer("linear 4096 -> 4096, batch 4096", 4096, 4096, 4096),
    Layer("linear 1024 -> 1024, batch 4096", 4096, 1024, 1024),
    Layer("conv 128 -> 128 3x3, 128 x 16x16", 128 * 16 * 16, 128, 128, 9),
    Layer("conv 256 -> 256 3x3, 128 x 8x8", 128 * 8 * 8, 256, 256, 9),
    Layer("conv 512 -> 512 3x3, 128 x 4x4", 128 * 4 * 4, 512, 512, 9),
    Layer("conv 256 -> 256 3x3, 256 x 14x14", 256 * 14 * 14, 256, 256, 9),
)
DENSITY = 0.05


class Cost(NamedTuple):
    """What a kernel does, and its launches."""

    flops: float
    l2_bytes: float
    memory_bytes: float
    launches: int

    def seconds(self, precision: str) -> float:
        """The slowest of the three, plus a launch for each kernel beyond the first."""
        work = max(
            self.flops / PEAK[precision],
            self.l2_bytes / L2_BYTES_PER_SECOND,
            self.memory_bytes / MEMORY_BYTES_PER_SECOND,
            LAUNCH_SECONDS,
        )
        return work + (self.launches - 1) * LAUNCH_SECONDS

    def bound(self, precision: str) -> str:
        """Which of the three it is."""
        parts = {
            "arithmetic": self.flops / PEAK[precision],
            "L2": self.l2_bytes / L2_BYTES_PER_SECOND,
            "memory": self.memory_bytes / MEMORY_BYTES_PER_SECOND,
            "launch": LAUNCH_SECONDS,
        }
        return max(parts, key=parts.__getitem__)


def blocks_of(layer: Layer, side: int) -> int:
    """Stored blocks at 5 %."""
    return round(DENSITY * layer.taps * (layer.outputs // side) * (layer.inputs // side))


def product_cost(layer: Layer, side: int, precision: str, op: str) -> Cost:
    """Forward or input gradient: each block reads one tile of x per tile of points."""
    dtype = DTYPES[precision]
    lists = (layer.inputs if op.endswith("_dgrad") else layer.outputs) // side
    problem = tiles.Problem(op, dtype, (side, side), layer.points, precision == "tf32", lists)
    tile = tiles.default_product(problem).tile_m
    blocks, size = blocks_of(layer, side), dtype.itemsize
    l2_bytes = blocks * -(-layer.points // tile) * (tile + side) * side * size
    stored = blocks * side * side
    # Values are read in float32 and written and read again in the dtype of the products.
    cast = stored * (4 + 2 * size) if size != 4 else stored * 4
    memory = layer.points * (layer.inputs + layer.outputs) * size + cast
    launches = 1 + (size != 4) + (op == "conv2d_dgrad")
    return Cost(2.0 * stored * layer.points, l2_bytes, memory, launches)


def wgrad_cost(layer: Layer, side: int, precision: str, op: str) -> Cost:
    """Weight gradient: dY is read once per program, x once per block."""
    dtype = DTYPES[precision]
    problem = tiles.Problem(op, dtype, (side, side), layer.points, precision == "tf32")
    config = tiles.default_wgrad(problem)
    blocks, size = blocks_of(layer, side), dtype.itemsize
    block_rows = layer.outputs // side
    per = min(config.per, max(1.0, blocks / block_rows))  # rows may be shorter than a program
    l2_bytes = blocks * layer.points * (side + side / per) * size
    parts = tiles.wgrad_parts(problem, config, blocks, block_rows)
    stored = blocks * side * side
    memory = layer.points * (layer.inputs + layer.outputs) * size + 4.0 * stored * (2 * parts + 1)
    return Cost(2.0 * stored * layer.points, l2_bytes, memory, 2)


def vector_costs(layer: Layer, side: int, precision: str) -> tuple[Cost, Cost, Cost]:
    """Forward, input and weight gradient of elements and V x 1 blocks, V = ``side``.

    Per point and block, forward reads one number of x, the input gradient V of dY, and the weight
    gradient one of x, and V of dY for each program. Nothing is assumed to stay in L1.
    """
    dtype = DTYPES[precision]
    blocks, size = round(DENSITY * layer.taps * layer.inputs * layer.outputs / side), dtype.itemsize
    stored = blocks * side
    flops, reads = 2.0 * stored * layer.points, blocks * layer.points * size
    cast = stored * (4 + 2 * size) if size != 4 else stored * 4
    memory = layer.points * (layer.inputs + layer.outputs) * size
    product = 1 + (size != 4)
    problem = tiles.Problem("linear_wgrad", dtype, (side, 1), layer.points, precision == "tf32")
    config = vector_config.default_vector_wgrad(problem)
    block_rows = layer.outputs // side
    per = min(config.per, max(1.0, blocks / block_rows))
    parts = tiles.wgrad_parts(problem, config, blocks, block_rows)
    return (
        Cost(flops, reads, memory + cast, product),
        Cost(flops, reads * side, memory + cast, product),
        Cost(flops, reads * (1 + side / per), memory + 4.0 * stored * (2 * parts + 1), 2),
    )


class Floor(NamedTuple):
    """The least time that a pass of elements or V x 1 blocks takes, and what bounds it."""

    seconds: float
    bound: str


def shared_memory_floor(layer: Layer, side: int, density: float, itemsize: int, name: str) -> Floor:
    """Of "forward", "dgrad" or "wgrad" when every activation comes out of shared memory.

    Per point and stored block at least one number is read there (in the input gradient V of dY:
    a block's V numbers meet in one sum), for V multiply-adds; weights, indices and sums are in
    registers. For elements in float32 a quarter of the peak. Issue 5 wants 60 % of this.

    "fp32 arithmetic" is at the peak of the plain cores, whatever the precision: a kernel that
    multiplies on tensor cores (16-bit types, TF32) may take less than this.
    """
    blocks = density * layer.taps * layer.inputs * layer.outputs / side
    reads = blocks * layer.points * itemsize * (side if name == "dgrad" else 1)
    moved = layer.points * (layer.inputs + layer.outputs) * itemsize + blocks * side * 4
    parts = {
        "fp32 arithmetic": 2.0 * blocks * side * layer.points / PEAK["fp32"],
        "shared memory": reads / SHARED_BYTES_PER_SECOND,
        "memory": moved / MEMORY_BYTES_PER_SECOND,
        "launch": LAUNCH_SECONDS,
    }
    bound = max(parts, key=parts.__getitem__)
    return Floor(parts[bound], bound)


def block_costs(layer: Layer, side: int, precision: str) -> tuple[Cost, Cost, Cost]:
    """Forward, input and weight gradient of square blocks."""
    kind = "linear" if layer.taps == 1 else "conv2d"
    return (
        product_cost(layer, side, precision, kind),
        product_cost(layer, side, precision, f"{kind}_dgrad"),
        wgrad_cost(layer, side, precision, f"{kind}_wgrad"),
    )


def problems(layer: Layer) -> Iterator[tuple[str, str, tuple[Cost, Cost, Cost], str]]:
    """(precision, block, costs, the cores that multiply, as a key of PEAK) of a layer."""
    for precision in PEAK:
        for side in (16, 32, 64):
            yield precision, f"{side}x{side}", block_costs(layer, side, precision), precision
    for precision in ("bf16", "fp32"):  # arithmetic counts at the plain cores' peak
        for side in (1, 4, 16):
            yield precision, f"{side}x1", vector_costs(layer, side, precision), "fp32"


def rows() -> list[str]:
    """Lines of the Markdown table of operators' times: blocks first, then V x 1."""
    head = "| layer | precision | block | forward us (bound) | dgrad us (bound) | wgrad us (bound) "
    lines = [head + "| sum us | dense us | ratio |", "|" + "---|" * 9]
    for vector in (False, True):
        for layer in LAYERS:
            lines += [
                row(layer, *found) for found in problems(layer) if found[1].endswith("x1") == vector
            ]
    return lines


def kernel_rows() -> list[str]:
    """Lines of the Markdown table of what each kernel does, for a linear layer and a convolution.

    Dropout, at the end, reads and writes every number of the layer's output once.
    """
    head = "| layer | precision | block | operator | GFLOP | MB through L2 | MB of memory "
    lines = [head + "| us | bound |", "|" + "---|" * 9]
    for layer in (LAYERS[0], LAYERS[-1]):
        for precision, block, costs, cores in problems(layer):
            for name, cost in zip(("forward", "dgrad", "wgrad"), costs, strict=True):
                lines.append(kernel_row(layer, precision, block, name, cost, cores))
        for precision in ("bf16", "fp32"):
            moved = 2.0 * layer.points * layer.outputs * DTYPES[precision].itemsize
            cost = Cost(0, moved, moved, 1)
            lines.append(kernel_row(layer, precision, "", "dropout", cost, "fp32"))
    return lines


def kernel_row(layer: Layer, precision: str, block: str, name: str, cost: Cost, cores: str) -> str:
    """One line: floating-point operations, bytes, and the time that follows."""
    return (
        f"| {layer.name} | {precision} | {block} | {name} | {cost.flops / 1e9:.2f} "
        f"| {cost.l2_bytes / 1e6:.0f} | {cost.memory_bytes / 1e6:.0f} "
        f"| {cost.seconds(cores) * 1e6:.1f} | {cost.bound(cores)} |"
    )


def row(
    layer: Layer, precision: str, block: str, costs: tuple[Cost, Cost, Cost], cores: str
) -> str:
    """One line: three kernels at the peak of ``cores``, their sum, the dense layer's three, and the
    ratio.
    """
    cells = [f"{c.seconds(cores) * 1e6:.0f} ({c.bound(cores)})" for c in costs]
    total = sum(cost.seconds(cores) for cost in costs)
    one = 2.0 * layer.points * layer.outputs * layer.inputs * layer.taps
    dense = 3 * max(one / (DENSE_SHARE_OF_PEAK * PEAK[precision]), LAUNCH_SECONDS)
    return (
        f"| {layer.name} | {precision} | {block} | {' | '.join(cells)} "
        f"| {total * 1e6:.0f} | {dense * 1e6:.0f} | {dense / total:.1f} |"
    )


def replaced(text: str, name: str, lines: list[str]) -> str:
    """``text`` with ``lines`` between the markers of ``name``. Raises ValueError without them."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if begin not in text or end not in text:
        raise ValueError(f"expected the markers {begin} and {end}, found none")
    before, after = text.split(begin)[0], text.split(end)[1]
    table = "\n".join(lines)
    return f"{before}{begin}\n{table}\n{end}{after}"


def main() -> int:
    """Write the tables into the document named on the command line, or print them."""
    tables = {"roofline": rows(), "kernel-roofline": kernel_rows()}
    if len(sys.argv) < 2:
        for lines in tables.values():
            print("\n".join(lines), end="\n\n")
        return 0
    path = Path(sys.argv[1])
    text = path.read_text(encoding="utf-8")
    for name, lines in tables.items():
        text = replaced(text, name, lines)
    path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
