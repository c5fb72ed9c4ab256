"""Tile sizes of the element and V x 1 kernels: a few candidates per class, the default first.

No Triton here. ``plan`` may time the candidates; tests/triton_kernels/compile_table.py compiles all
of them for every supported chip.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sparse_kernels.backends.triton.block_config import Problem, is_wgrad, next_power, strict

#: Programs that a large GPU should have, at least (four per multiprocessor of an H100). A constant:
#: results must not depend on the machine at hand.
_WANTED_PROGRAMS = 4 * 132
#: Blocks whose sums fill at least half of a tensor core's tile, the rest being padding.
_LEAST_DOT = 8
#: Points of a tile on the tensor cores.
_DOT_TILE = 128


class VectorConfig(NamedTuple):
    """Tiles of forward and input gradient."""

    tile_m: int  # points
    unroll: int  # blocks whose rows are read together, or multiplied together by ``dot``
    dot: bool  # rows gathered for the tensor cores (forward only)
    num_warps: int
    num_stages: int


class VectorWgradConfig(NamedTuple):
    """Tiles of the weight gradient."""

    tile_m: int  # points per step
    per: int  # blocks per program, a power of two
    dot: bool  # products by tl.dot
    num_warps: int
    num_stages: int


def vector_candidates(
    problem: Problem,
) -> tuple[VectorConfig, ...] | tuple[VectorWgradConfig, ...]:
    """One to four configurations for a problem, all correct; the first is the default."""
    return wgrad_candidates(problem) if is_wgrad(problem) else product_candidates(problem)


def product_candidates(problem: Problem) -> tuple[VectorConfig, ...]:
    """Candidates of forward and input gradient."""
    v = next_power(problem.block[0])
    # Points per thread: four make one load of 16 bytes; more sums per thread spill.
    each = 4 if v <= 4 else 2 if v <= 8 else 1
    unroll = 4 if v <= 8 else 2
    full = 128 * each
    tall = _tile_m(problem, full)
    # Reading more blocks together spills on sm_80 and sm_100 where a thread has several points.
    other = _plain(128, unroll, each) if each > 1 else _plain(full, 2 * unroll, each)
    if tall < full:  # few points: what else there is to try is the next larger tile
        other = _plain(2 * tall, unroll, each)
    plain = [_plain(tall, unroll, each), other]
    found = [] if problem.op.endswith("_dgrad") else _dots(problem, v)
    if found and found[0].tile_m < _DOT_TILE:
        plain = []
    return tuple(dict.fromkeys((*found, *plain)))


def _plain(tile: int, unroll: int, each: int) -> VectorConfig:
    return VectorConfig(tile, unroll, False, max(1, min(4, tile // (32 * each))), 1)


def _dots(problem: Problem, v: int) -> list[VectorConfig]:
    """On the tensor cores, where the dtype has them and a block fills half of a tile or more."""
    if strict(problem) or v < _LEAST_DOT:
        return []
    tall = _tile_m(problem, _DOT_TILE)
    deep = 32 if problem.dtype != torch.float32 else 16
    tiles = (tall, 2 * tall) if tall < _DOT_TILE else (tall,)
    return [VectorConfig(tile, deep, True, 4, 3) for tile in tiles]


def _tile_m(problem: Problem, most: int) -> int:
    """Points per tile: fewer for few points, or where the GPU would have idle processors."""
    tall = min(most, max(32, next_power(max(1, problem.points))))
    while tall > 32 and problem.lists * -(-problem.points // tall) < _WANTED_PROGRAMS:
        tall //= 2
    return tall


def wgrad_candidates(problem: Problem) -> tuple[VectorWgradConfig, ...]:
    """Candidates of the weight gradient."""
    v = next_power(problem.block[0])
    if strict(problem):
        if v > 8:  # tl.dot without tensor cores: sums shared by the threads, no padding
            return VectorWgradConfig(32, 32, True, 4, 2), VectorWgradConfig(32, 16, True, 4, 2)
        # One warp holds whole rows of points: no sum crosses warps until the end.
        # 64 points of 16 rows, or 128 of 8: more spills where a batch is odd.
        wide = VectorWgradConfig(64, max(1, 16 // v), False, 1, 1)
        return wide, wide._replace(per=max(1, 8 // v), tile_m=128)
    deep = 128 if problem.dtype != torch.float32 else 64
    wide = VectorWgradConfig(deep, 64, True, 4, 3)
    return wide, wide._replace(per=32), wide._replace(per=16)


def default_vector(problem: Problem) -> VectorConfig:
    """The configuration used where nobody chose one."""
    return product_candidates(problem)[0]


def default_vector_wgrad(problem: Problem) -> VectorWgradConfig:
    """The configuration used where nobody chose one."""
    return wgrad_candidates(problem)[0]
