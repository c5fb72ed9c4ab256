"""Tile sizes of the block kernels: a few candidates per class of problem, the default first.

No Triton here. ``plan`` may time the candidates; all of them are compiled for every supported chip
by tests/triton_kernels/compile_table.py, so none spills registers or outgrows the shared memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

#: Dynamic shared memory that one program may use, in bytes: sm_80, sm_90 and sm_100.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}

#: Multiprocessors of an H100. A constant, not the number of the machine at hand: results must not
#: depend on it.
_MULTIPROCESSORS = 132
#: Programs that a weight gradient is split for.
_WANTED_PROGRAMS = 4 * _MULTIPROCESSORS
_MAX_PARTS = 64
_MAX_PARTS_BYTES = 64 * 2**20


class Problem(NamedTuple):
    """What the choice of a configuration depends on."""

    op: str  # "linear", "linear_dgrad", ..., "conv2d_wgrad"
    dtype: torch.dtype  # of the activations
    block: tuple[int, int]
    points: int  # rows of the batch, or pixels of the result (wgrad: of the gradient)
    tf32: bool = False  # float32 products may be rounded to TF32
    lists: int = 1 << 20  # lists of blocks (forward: block rows), each of which a tile walks


class ProductConfig(NamedTuple):
    """Tiles of forward and input gradient."""

    tile_m: int  # points
    tile_k: int  # input channels per product; larger blocks take several
    paired: bool  # two products per iteration of the pipeline
    num_warps: int
    num_stages: int


class WgradConfig(NamedTuple):
    """Tiles of the weight gradient."""

    tile_m: int  # points per product
    per: int  # blocks per program, a power of two
    num_warps: int
    num_stages: int


def next_power(side: int) -> int:
    """The smallest power of two that is not below ``side``."""
    return 1 << (side - 1).bit_length()


def strict(problem: Problem) -> bool:
    """Whether products are float32 without TF32, which the tensor cores do not have."""
    return problem.dtype == torch.float32 and not problem.tf32


def is_wgrad(problem: Problem) -> bool:
    """Whether the problem is a weight gradient."""
    return problem.op.endswith("_wgrad")


def sides(problem: Problem) -> tuple[int, int]:
    """Sides (n, k) of a block as forward or input gradient see it, up to powers of two."""
    bh, bw = problem.block
    n, k = (bw, bh) if problem.op.endswith("_dgrad") else (bh, bw)
    return next_power(n), next_power(k)


def candidates(problem: Problem) -> tuple[ProductConfig, ...] | tuple[WgradConfig, ...]:
    """Two to six configurations for a problem, all correct; the first is the default."""
    return wgrad_candidates(problem) if is_wgrad(problem) else product_candidates(problem)


def product_candidates(problem: Problem) -> tuple[ProductConfig, ...]:
    """Candidates of forward and input gradient."""
    tall = _tile_m(problem)
    full = 64 if strict(problem) else 128
    if tall < full:  # few points: what else there is to try is the next larger tile
        return _default_tiles(problem, tall), _default_tiles(problem, 2 * tall)
    first = _default_tiles(problem, tall)
    if strict(problem):
        return first, first._replace(tile_m=32, num_stages=4)
    n, _ = sides(problem)
    k, pair = first.tile_k, first.paired
    wide = _wide(problem)
    found = [first, ProductConfig(64, k, pair, 8 if n > 64 else 4, 4)]
    # The input gradient's TF32 tiles take registers to transpose; deeper ones spill on sm_100.
    if wide == 64 or not problem.op.endswith("_dgrad"):
        found.append(first._replace(num_stages=4))
        if pair:
            found.append(first._replace(paired=False, num_stages=5))
        elif k > 32 or (k > 16 and wide == 32):
            found.append(first._replace(tile_k=k // 2, num_stages=5))
    return tuple(config for config in found if _product_bytes(problem, config) <= _smallest())


def _wide(problem: Problem) -> int:
    """Channels that one product reads at most on the tensor cores."""
    return 64 if problem.dtype != torch.float32 else 32


def _default_tiles(problem: Problem, tall: int) -> ProductConfig:
    """The default for tiles of ``tall`` points."""
    n, side_k = sides(problem)
    if strict(problem):
        # The plain cores read both operands from shared memory: small tiles keep the registers.
        return ProductConfig(min(tall, 64), 16, False, 8 if n > 64 else 4, 3)
    wide = _wide(problem)
    k = min(side_k, wide)
    # Four warps hold 128 x 64 sums, but registers spill where operands are float32 or channels odd
    # (no asynchronous copy), and on sm_100 with narrow float32 tiles from 32 columns.
    most = 32 if wide == 64 or k > 16 else 16
    warps = 8 if n > most and tall > 64 else 4
    # Small blocks: two of them keep the pipeline as full as a large one. In float32 one does, and
    # two spill a few registers on sm_100.
    return ProductConfig(tall, k, k < wide and wide == 64, warps, 3)


def _tile_m(problem: Problem) -> int:
    """Points per tile: 128, fewer for few points, or where the GPU would have idle processors."""
    tall = min(128, max(16, next_power(max(1, problem.points))))
    while tall > 32 and problem.lists * -(-problem.points // tall) < _MULTIPROCESSORS:
        tall //= 2
    return tall


def _product_bytes(problem: Problem, config: ProductConfig) -> int:
    """Shared memory of the pipeline's stages."""
    elements = (config.tile_m + sides(problem)[0]) * config.tile_k * (2 if config.paired else 1)
    return elements * config.num_stages * problem.dtype.itemsize


def _smallest() -> int:
    return min(SHARED_LIMIT.values())


def wgrad_candidates(problem: Problem) -> tuple[WgradConfig, ...]:
    """Candidates of the weight gradient."""
    rows, side = next_power(problem.block[0]), next_power(problem.block[1])
    if strict(problem):
        per = max(1, 64 // side)
        sums = rows * per * side
        # Of three stages Triton 3.6 spills for sm_90 where 4 warps hold 64 x 64 sums.
        few = 8 if sums > 64 * 64 else 4, 8 if sums >= 64 * 64 else 4
        return tuple(WgradConfig(16, per, few[stages - 2], stages) for stages in (2, 3))
    deep = 64 if problem.dtype != torch.float32 else 32
    found = []
    for width in (128, 64):
        per = max(1, width // side)
        warps = 8 if rows * per * side > 64 * 64 else 4  # more sums per thread spill on sm_80
        found.append(WgradConfig(deep, per, warps, 3))
        if width == 128:
            found.append(WgradConfig(deep // 2, per, warps, 4))
    return tuple(dict.fromkeys(found))


def default_product(problem: Problem) -> ProductConfig:
    """The configuration used where nobody chose one."""
    return product_candidates(problem)[0]


def default_wgrad(problem: Problem) -> WgradConfig:
    """The configuration used where nobody chose one."""
    return wgrad_candidates(problem)[0]


def wgrad_parts(problem: Problem, config: Any, capacity: int, block_rows: int) -> int:
    """Parts that the points of a weight gradient are split into.

    ``config`` has ``per`` and ``tile_m``. Depends on shapes and capacity only: the same on every
    machine and for every pattern of a layer.
    Enough programs for a large GPU, at least four tiles per part, partial sums within 64 MiB.
    """
    programs = capacity // config.per + block_rows
    tiles = max(1, -(-problem.points // config.tile_m))
    part_bytes = max(1, capacity * problem.block[0] * problem.block[1] * 4)
    parts = min(-(-_WANTED_PROGRAMS // programs), tiles // 4, _MAX_PARTS)
    parts = max(1, min(parts, _MAX_PARTS_BYTES // part_bytes))
    steps = -(-tiles // parts)
    return -(-tiles // steps)  # no part without a tile
