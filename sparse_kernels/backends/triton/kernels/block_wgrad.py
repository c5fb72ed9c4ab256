"""Triton kernels of the block weight gradient (SDDMM): dV[b] = sum over points of dY^T X.

One program computes PER neighbouring blocks of one block row over one part of the points: the tile
of dY is read once for all of them, and small blocks fill the tensor cores. Parts are summed by a
second kernel in a fixed order: no atomics, equal inputs give equal bits.
"""

# No `from __future__ import annotations`: the interpreter of Triton 3.6 wants real annotations.
import triton
import triton.language as tl

from sparse_kernels.backends.triton.kernels.block_product import image_row_column, tap_shift


@triton.jit
def slot_row(crow, rows, slot, PER: tl.constexpr, CHUNK: tl.constexpr):
    """Block row that a slot of PER blocks belongs to.

    Row i owns the slots from crow[i] // PER + i to crow[i + 1] // PER + i: at least as many as it
    fills, and a grid of capacity // PER + rows holds them all, whatever the pattern.
    """
    before = 0
    for first in tl.range(0, rows, CHUNK):
        i = first + tl.arange(0, CHUNK)
        opens = tl.load(crow + i, mask=i < rows, other=0) // PER + i
        before += tl.sum(((i < rows) & (opens <= slot)).to(tl.int32), axis=0)
    return before - 1


@triton.jit
def load_points(
    x,
    x_channels,
    point,
    inside,
    channel,
    channel_inside,
    shift,
    y_size,
    x_size,
    window,
    SPATIAL: tl.constexpr,
    LONG: tl.constexpr,
):
    """Tile [points, channels] of x at the pixels that y's points read; a shift per channel or one.

    shift broadcasts against [points, 1]: of blocks with several taps it is [1, channels].
    """
    inside = inside[:, None]
    pixel = point[:, None]
    if SPATIAL:
        image, i, j = image_row_column(pixel, y_size[0], y_size[1])
        tall, wide = i * window[1] + shift[0], j * window[2] + shift[1]
        inside = inside & (tall >= 0) & (tall < x_size[0]) & (wide >= 0) & (wide < x_size[1])
        pixel = (image * x_size[0] + tall) * x_size[1] + wide
    if LONG:
        pixel = pixel.to(tl.int64)
    mask = inside & channel_inside[None, :]
    return tl.load(x + pixel * x_channels + channel[None, :], mask=mask, other=0.0)


@triton.jit
def block_wgrad(
    out,  # float32 [parts, capacity, BLOCK_ROWS, BLOCK_COLS]
    grad,  # [pixels of y, y_channels]
    x,  # [pixels of x, x_channels]
    crow,  # int32 [rows + 1]
    col,  # int32 [capacity]
    total,  # pixels of y
    steps,  # tiles of TILE_M points in a part
    rows,  # block rows
    capacity,
    y_blocks,  # blocks of y's channels per group
    x_blocks,
    y_group,  # channels per group
    x_group,
    y_channels,
    x_channels,
    y_h,
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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    SPATIAL: tl.constexpr,  # False: point p of y reads point p of x (linear, 1x1 convolution)
    PRECISION: tl.constexpr,  # of float32 products: "tf32" or "ieee"
    LONG: tl.constexpr,  # offsets do not fit into 32 bits
    TILE_M: tl.constexpr,  # points
    TILE_R: tl.constexpr,  # rows of a block, up to a power of two
    SIDE: tl.constexpr,  # columns of a block, up to a power of two
    PER: tl.constexpr,  # blocks per program
):
    window = (taps_w, stride_h, stride_w, dilation_h, dilation_w, pad_h, pad_w)
    slot, part = tl.program_id(0), tl.program_id(1)
    row = slot_row(crow, rows, slot, PER, 256)
    start = tl.load(crow + row)
    last = tl.load(crow + row + 1)
    first = start + (slot - (start // PER + row)) * PER
    if first < last:
        j = tl.arange(0, PER * SIDE)
        block, w = first + j // SIDE, j % SIDE
        stored = (block < last) & (w < BLOCK_COLS)
        # One by one: a vector of 128 list items counts as an expensive load, which Triton will not
        # repeat in another layout; it would move masks through shared memory in the loop instead.
        found = tl.load(col + first)
        for p in tl.static_range(1, PER):
            item = tl.load(col + first + p, mask=first + p < last, other=0)
            found = tl.where(j // SIDE == p, item, found)
        x_channel = (found % x_blocks) * BLOCK_COLS + w
        x_inside = stored & (x_channel < x_group)
        x_channel += (row // y_blocks) * x_group
        down, right = tap_shift(found // x_blocks, (0, 0), window, False)
        if PER > 1:
            down, right = down[None, :], right[None, :]
        h = tl.arange(0, TILE_R)
        y_channel = (row % y_blocks) * BLOCK_ROWS + h
        y_inside = (h < BLOCK_ROWS) & (y_channel < y_group)
        y_channel += (row // y_blocks) * y_group
        sums = tl.zeros((PER * SIDE, TILE_R), dtype=tl.float32)
        for step in tl.range(0, steps):
            point = (part * steps + step) * TILE_M + tl.arange(0, TILE_M)
            inside = point < total
            a = load_points(
                x,
                x_channels,
                point,
                inside,
                x_channel,
                x_inside,
                (down, right),
                (y_h, y_w),
                (x_h, x_w),
                window,
                SPATIAL,
                LONG,
            )
            at = point.to(tl.int64) if LONG else point
            b = tl.load(
                grad + at[:, None] * y_channels + y_channel[None, :],
                mask=inside[:, None] & y_inside[None, :],
                other=0.0,
            )
            sums = tl.dot(tl.trans(a), b, sums, input_precision=PRECISION)
        to = part * capacity + block
        if LONG:
            to = to.to(tl.int64)
        to = to[:, None] * (BLOCK_ROWS * BLOCK_COLS) + h[None, :] * BLOCK_COLS + w[:, None]
        tl.store(out + to, sums, mask=stored[:, None] & (h < BLOCK_ROWS)[None, :])


@triton.jit
def sum_parts(out, parts, crow, rows, capacity, PARTS, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """out [capacity * BLOCK] = the sum of parts [PARTS, capacity * BLOCK], first part first.

    Zero in the tail beyond crow[rows] blocks, whose parts nobody wrote.
    """
    i = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    stored = i < tl.load(crow + rows).to(tl.int64) * BLOCK
    sums = tl.zeros((CHUNK,), dtype=tl.float32)
    # Not capacity.to(): an argument that is 1 arrives as a compile-time constant.
    step = tl.full((), BLOCK, tl.int64) * capacity
    for part in tl.range(0, PARTS):
        sums += tl.load(parts + part * step + i, mask=stored, other=0.0)
    tl.store(out + i, sums, mask=i < step)
