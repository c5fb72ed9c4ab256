"""Triton kernels of element and V x 1 blocks: forward and input gradient, linear and conv2d.

Feature-major memory: a channel's row holds all its points, pixel after pixel with the batch
innermost, so that neighbouring threads read neighbouring points of one row. One program computes a
tile of points of one block row (forward) or of one input channel (input gradient) and walks its
list of stored blocks; each block is one row of the input, read where the block's tap says.
"""

# No `from __future__ import annotations`: the interpreter of Triton 3.6 wants real annotations.
import triton
import triton.language as tl

from sparse_kernels.backends.triton.kernels.block_lists import column_span
from sparse_kernels.backends.triton.kernels.block_product import image_row_column, tap_shift


@triton.jit
def shifted(points, shift, size, batch, SPATIAL: tl.constexpr):
    """Points of the other image that a tap reads, and which of them exist.

    points: (inside, row, column, image number, own number); shift broadcasts against them.
    """
    inside, row, column, image, number = points
    if SPATIAL:
        row, column = row + shift[0], column + shift[1]
        inside = inside & (row >= 0) & (row < size[0]) & (column >= 0) & (column < size[1])
        number = (row * size[1] + column) * batch + image
    return inside, number


@triton.jit
def row_start(tensor, channel, points, LONG: tl.constexpr):
    """Pointer to the first point of a channel."""
    if LONG:
        channel = channel.to(tl.int64)
    return tensor + channel * points


@triton.jit
def forward_points(point, total, batch, y_w, window, SPATIAL: tl.constexpr):
    """Points of y as ``shifted`` wants them: what each reads of x without a tap's shift."""
    row, column, image = point, point, point
    if SPATIAL:
        row, column, image = image_row_column(point, y_w, batch)
        row, column = row * window[1], column * window[2]
    return point < total, row, column, image, point


@triton.jit
def store_rows(
    y,
    sums,  # float32 [TILE_V, TILE_M]
    bias,
    channel,
    channel_inside,
    point,
    total,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    LONG: tl.constexpr,
):
    """Bias, ReLU and rounding at the store; NaN stays NaN, as torch's own ReLU has it."""
    if HAS_BIAS:
        sums += tl.load(bias + channel, mask=channel_inside, other=0.0).to(tl.float32)[:, None]
    if RELU:
        sums = tl.where(sums < 0, 0.0, sums)
    pointers = row_start(y, channel, total, LONG)[:, None] + point[None, :]
    mask = channel_inside[:, None] & (point < total)[None, :]
    tl.store(pointers, sums.to(y.dtype.element_ty), mask=mask)


@triton.jit
def vector_product(
    y,  # [y's channels, total points]
    x,  # [x's channels, x_points]
    values,  # [capacity, BLOCK] in x's dtype
    bias,  # [y's channels], any dtype; not read unless HAS_BIAS
    crow,  # int32 [rows + 1]
    col,  # int32 [capacity]: tap * x_group + channel within the group
    order,  # int32 [rows]: the block rows, long ones first
    total,  # points of y: height * width * batch
    x_points,
    rows,  # groups * row_blocks
    row_blocks,  # block rows per group
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
    TILE_V: tl.constexpr,  # V up to a power of two
    SPATIAL: tl.constexpr,  # False: point p of y reads point p of x (linear, 1x1 convolution)
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    LONG: tl.constexpr,  # offsets do not fit into 32 bits
    UNROLL: tl.constexpr,  # blocks whose rows are read together
    TILE_M: tl.constexpr,
):
    """Products on the plain cores: each thread keeps all V sums of its points."""
    window = (taps_w, stride_h, stride_w, dilation_h, dilation_w, pad_h, pad_w)
    row = tl.load(order + tl.program_id(0) % rows)
    point = (tl.program_id(0) // rows) * TILE_M + tl.arange(0, TILE_M)
    exists, i, j, image, number = forward_points(point, total, batch, y_w, window, SPATIAL)
    # A row of a matrix: loaded as a vector, it would pass through shared memory to become one.
    points = (exists[None, :], i[None, :], j[None, :], image[None, :], number[None, :])
    group = row // row_blocks
    r = tl.arange(0, TILE_V)
    sums = tl.zeros((TILE_V, TILE_M), dtype=tl.float32)
    start = tl.load(crow + row)
    last = tl.load(crow + row + 1)
    for step in tl.range(start, last, UNROLL):
        for u in tl.static_range(UNROLL):
            block = step + u
            item = tl.load(col + block, mask=block < last, other=0)
            shift = tap_shift(item // x_group, (0, 0), window, False)
            inside, at = shifted(points, shift, (x_h, x_w), batch, SPATIAL)
            source = row_start(x, group * x_group + item % x_group, x_points, LONG)
            # What lies beyond the list must not be read: 0 times infinity would be NaN.
            a = tl.load(source + at, mask=inside & (block < last), other=0.0)
            stored = row_start(values, block, BLOCK, LONG) + r
            w = tl.load(stored, mask=(r < BLOCK) & (block < last), other=0.0)
            sums += w.to(tl.float32)[:, None] * a.to(tl.float32)
    channel = (row % row_blocks) * BLOCK + r
    r_inside = (r < BLOCK) & (channel < y_group)
    channel += group * y_group
    store_rows(y, sums, bias, channel, r_inside, point, total, HAS_BIAS, RELU, LONG)


@triton.jit
def vector_gather(
    y,
    x,
    values,
    bias,
    crow,
    col,
    order,
    total,
    x_points,
    rows,
    row_blocks,
    y_group,
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
    BLOCK: tl.constexpr,
    TILE_V: tl.constexpr,  # at least 16
    SPATIAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    LONG: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products: "tf32" or "ieee"
    UNROLL: tl.constexpr,  # blocks per product, at least 16
    TILE_M: tl.constexpr,
):
    """The same on the tensor cores: rows of x are gathered, UNROLL of them per product."""
    window = (taps_w, stride_h, stride_w, dilation_h, dilation_w, pad_h, pad_w)
    row = tl.load(order + tl.program_id(0) % rows)
    point = (tl.program_id(0) // rows) * TILE_M + tl.arange(0, TILE_M)
    exists, i, j, image, number = forward_points(point, total, batch, y_w, window, SPATIAL)
    points = (exists[:, None], i[:, None], j[:, None], image[:, None], number[:, None])
    group = row // row_blocks
    r, k = tl.arange(0, TILE_V), tl.arange(0, UNROLL)
    sums = tl.zeros((TILE_M, TILE_V), dtype=tl.float32)
    start = tl.load(crow + row)
    last = tl.load(crow + row + 1)
    # Items are read one iteration ahead, as in block_product: the pipeline is for the tiles.
    item = tl.load(col + start + k, mask=start + k < last, other=0)
    for step in tl.range(start, last, UNROLL):
        block = step + k
        down, right = tap_shift(item // x_group, (0, 0), window, False)
        inside, at = shifted(points, (down[None, :], right[None, :]), (x_h, x_w), batch, SPATIAL)
        source = row_start(x, group * x_group + item % x_group, x_points, LONG)
        a = tl.load(source[None, :] + at, mask=inside & (block < last)[None, :], other=0.0)
        stored = row_start(values, block, BLOCK, LONG)[:, None] + r[None, :]
        b = tl.load(stored, mask=(block < last)[:, None] & (r < BLOCK)[None, :], other=0.0)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
        item = tl.load(col + block + UNROLL, mask=block + UNROLL < last, other=0)
    channel = (row % row_blocks) * BLOCK + r
    r_inside = (r < BLOCK) & (channel < y_group)
    channel += group * y_group
    store_rows(y, tl.trans(sums), bias, channel, r_inside, point, total, HAS_BIAS, RELU, LONG)


@triton.jit
def vector_dgrad(
    dx,  # [dx's channels, height * width * batch]
    grad,  # [grad's channels, grad_points]
    values,  # [capacity, BLOCK] in grad's dtype
    t_crow,  # int32 [taps * dx_group + 1]
    t_row,  # int32 [capacity]: block row
    t_perm,  # int32 [capacity]: index into values
    order,  # int32 [rows]: the lists, long ones first
    total,  # points of a phase: lattice_h * lattice_w * batch
    dx_points,
    grad_points,
    rows,  # lists: groups * phases * dx_group
    row_blocks,  # block rows per group
    dx_group,  # channels per group
    grad_group,
    batch,
    lattice_w,
    dx_h,
    dx_w,
    grad_h,
    grad_w,
    taps,
    taps_w,
    stride_h,
    stride_w,
    dilation_h,
    dilation_w,
    pad_h,
    pad_w,
    BLOCK: tl.constexpr,
    TILE_V: tl.constexpr,
    SPATIAL: tl.constexpr,
    SEARCH: tl.constexpr,  # bisections that find a group in a column; 0 for one group
    LONG: tl.constexpr,
    UNROLL: tl.constexpr,
    TILE_M: tl.constexpr,
):
    """Input gradient: a tile of points of one phase of the stride and one channel, tap after tap.

    The pattern's columns are walked where they are: no list is made for each call.
    """
    window = (taps_w, stride_h, stride_w, dilation_h, dilation_w, pad_h, pad_w)
    number = tl.load(order + tl.program_id(0) % rows)
    point = (tl.program_id(0) // rows) * TILE_M + tl.arange(0, TILE_M)
    channel, group = number % dx_group, number // dx_group
    phase_h, phase_w = 0, 0
    i, j, image, at_dx, exists = point, point, point, point, point < total
    if SPATIAL:
        group, phase_h, phase_w = image_row_column(group, stride_h, stride_w)
        i, j, image = image_row_column(point, lattice_w, batch)
        dx_i, dx_j = i * stride_h + phase_h, j * stride_w + phase_w
        at_dx = (dx_i * dx_w + dx_j) * batch + image
        exists = exists & (dx_i < dx_h) & (dx_j < dx_w)
    points = (point < total, i, j, image, point)
    r = tl.arange(0, TILE_V)
    sums = tl.zeros((TILE_V, TILE_M), dtype=tl.float32)
    for tap in tl.range(0, taps):
        meets = number < rows
        if SPATIAL:
            # (stride - 1) * pad is -pad modulo the stride, and never negative.
            tap_h = ((tap // taps_w) * dilation_h + (stride_h - 1) * pad_h) % stride_h
            tap_w = ((tap % taps_w) * dilation_w + (stride_w - 1) * pad_w) % stride_w
            meets = (tap_h == phase_h) & (tap_w == phase_w)
        column = tap * dx_group + channel
        low, high = column_span(t_crow, t_row, column, meets, group, row_blocks, SEARCH)
        shift = tap_shift(tap, (phase_h, phase_w), window, True)
        inside, at = shifted(points, shift, (grad_h, grad_w), batch, SPATIAL)
        for step in tl.range(low, high, UNROLL):
            for u in tl.static_range(UNROLL):
                in_list = step + u < high
                row = tl.load(t_row + step + u, mask=in_list, other=0) - group * row_blocks
                block = tl.load(t_perm + step + u, mask=in_list, other=0)
                r_inside = (r < BLOCK) & (row * BLOCK + r < grad_group) & in_list
                source = row_start(grad, group * grad_group + row * BLOCK + r, grad_points, LONG)
                mask = r_inside[:, None] & inside[None, :]
                a = tl.load(source[:, None] + at[None, :], mask=mask, other=0.0)
                w = tl.load(row_start(values, block, BLOCK, LONG) + r, mask=r_inside, other=0.0)
                sums += w.to(tl.float32)[:, None] * a.to(tl.float32)
    target = row_start(dx, group * dx_group + channel, dx_points, LONG)
    tl.store(target + at_dx, tl.sum(sums, axis=0).to(dx.dtype.element_ty), mask=exists)
