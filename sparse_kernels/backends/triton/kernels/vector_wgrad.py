"""Triton kernel of the weight gradient of element and V x 1 blocks (SDDMM), feature-major.

One program computes PER neighbouring blocks of one block row over one part of the points. Both
operands are rows of points: those of dY are shared by all blocks, those of X are gathered. The
parts are summed by ``sum_parts`` in a fixed order: no atomics, equal inputs give equal bits.
"""

# No `from __future__ import annotations`: the interpreter of Triton 3.6 wants real annotations.
import triton
import triton.language as tl

from sparse_kernels.backends.triton.kernels.block_product import tap_shift
from sparse_kernels.backends.triton.kernels.block_wgrad import slot_row
from sparse_kernels.backends.triton.kernels.vector_product import (
    forward_points,
    row_start,
    shifted,
)


@triton.jit
def vector_wgrad(
    out,  # float32 [parts, capacity, BLOCK]
    grad,  # [y's channels, total points]
    x,  # [x's channels, x_points]
    crow,  # int32 [rows + 1]
    col,  # int32 [capacity]: tap * x_group + channel within the group
    total,
    x_points,
    steps,  # tiles of TILE_M points in a part
    rows,  # groups * row_blocks
    capacity,
    row_blocks,
    y_group,  # channels per group
    x_group,
    batch,
    y_w,
    x_h,
    x_w,
    taps_w,
    stride_h,
    stride_w,
    dilation_h,
    dilation_w,
    pad_h,
    pad_w,
    BLOCK: tl.constexpr,  # V
    TILE_V: tl.constexpr,  # V up to a power of two; at least 16 if DOT
    SPATIAL: tl.constexpr,  # False: point p of y reads point p of x (linear, 1x1 convolution)
    DOT: tl.constexpr,  # products by tl.dot, on the tensor cores where the dtype has them
    PRECISION: tl.constexpr,  # of float32 products: "tf32" or "ieee"
    LONG: tl.constexpr,  # offsets do not fit into 32 bits
    TILE_M: tl.constexpr,  # points
    PER: tl.constexpr,  # blocks; at least 16 if DOT
):
    window = (taps_w, stride_h, stride_w, dilation_h, dilation_w, pad_h, pad_w)
    slot, part = tl.program_id(0), tl.program_id(1)
    row = slot_row(crow, rows, slot, PER, 1024)
    start = tl.load(crow + row)
    last = tl.load(crow + row + 1)
    first = start + (slot - (start // PER + row)) * PER
    if first < last:
        group = row // row_blocks
        block = first + tl.arange(0, PER)
        stored = block < last
        item = tl.load(col + block, mask=stored, other=0)
        down, right = tap_shift(item // x_group, (0, 0), window, False)
        shift = (down[:, None], right[:, None])
        x_row = row_start(x, group * x_group + item % x_group, x_points, LONG)
        r = tl.arange(0, TILE_V)
        y_channel = (row % row_blocks) * BLOCK + r
        r_inside = (r < BLOCK) & (y_channel < y_group)
        y_row = row_start(grad, group * y_group + y_channel, total, LONG)
        if DOT:
            sums = tl.zeros((PER, TILE_V), dtype=tl.float32)
        elif TILE_V == 1:
            sums = tl.zeros((PER, TILE_M), dtype=tl.float32)
        else:
            sums = tl.zeros((PER, TILE_V, TILE_M), dtype=tl.float32)
        for step in tl.range(0, steps):
            point = (part * steps + step) * TILE_M + tl.arange(0, TILE_M)
            exists, i, j, image, number = forward_points(point, total, batch, y_w, window, SPATIAL)
            points = (exists[None, :], i[None, :], j[None, :], image[None, :], number[None, :])
            inside, at = shifted(points, shift, (x_h, x_w), batch, SPATIAL)
            a = tl.load(x_row[:, None] + at, mask=inside & stored[:, None], other=0.0)
            mask = r_inside[:, None] & exists[None, :]
            b = tl.load(y_row[:, None] + point[None, :], mask=mask, other=0.0)
            if DOT:
                sums = tl.dot(a, tl.trans(b), sums, input_precision=PRECISION)
            elif TILE_V == 1:
                sums += a.to(tl.float32) * b.to(tl.float32)
            else:
                sums += a.to(tl.float32)[:, None, :] * b.to(tl.float32)[None, :, :]
        to = row_start(out, part * capacity + block, BLOCK, LONG)
        if TILE_V == 1:
            tl.store(to, tl.sum(sums, axis=1), mask=stored)
        else:
            if not DOT:
                sums = tl.sum(sums, axis=2)
            tl.store(to[:, None] + r[None, :], sums, mask=stored[:, None] & (r < BLOCK)[None, :])
