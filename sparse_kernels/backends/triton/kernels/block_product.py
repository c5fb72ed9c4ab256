"""Triton kernel of the block product: forward and input gradient, linear and conv2d.

One program computes a tile of TILE_M points (batch rows or pixels) by one block of output channels.
It walks the list of stored blocks that reach these channels, and for each multiplies a tile of the
input, read where the block's tap and channels say, with the block: no im2col, no dense weight.
"""

# No `from __future__ import annotations`: the interpreter of Triton 3.6 wants real annotations.
import triton
import triton.language as tl


@triton.jit
def image_row_column(point, height, width):
    """Image, row and column of points counted row by row over images of height x width."""
    rest = point // width
    return rest // height, rest % height, point % width


@triton.jit
def tap_shift(tap, phase, window, TRANSPOSED: tl.constexpr):
    """Rows and columns between a point's own place in the input and what a tap reads there.

    Transposed, the points of one phase are input pixels stride apart, and the taps of their lists
    are those that meet output pixels: the division leaves no remainder.
    """
    taps_w, stride_h, stride_w, dilation_h, dilation_w, pad_h, pad_w = window
    down = (tap // taps_w) * dilation_h - pad_h
    right = (tap % taps_w) * dilation_w - pad_w
    if TRANSPOSED:
        down = (phase[0] - down) // stride_h
        right = (phase[1] - right) // stride_w
    return down, right


@triton.jit
def points_of(tile, phase, lattice, y_size, x_size, window, TRANSPOSED: tl.constexpr):
    """Where a tile's points lie: pixel of y, whether it exists, row, column and pixel of x."""
    image, i, j = image_row_column(tile, lattice[0], lattice[1])
    if TRANSPOSED:
        x_row, x_col = i, j
        y_row, y_col = i * window[1] + phase[0], j * window[2] + phase[1]
    else:
        x_row, x_col = i * window[1], j * window[2]
        y_row, y_col = i, j
    y_pixel = (image * y_size[0] + y_row) * y_size[1] + y_col
    exists = (y_row < y_size[0]) & (y_col < y_size[1])
    return y_pixel, exists, x_row, x_col, (image * x_size[0] + x_row) * x_size[1] + x_col


@triton.jit
def list_item(source, place, step, last, PARTS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Tap and input block of a list item, and the index of its block in values."""
    item = step // PARTS
    found = tl.load(source + item, mask=step < last, other=0)
    block = item
    if TRANSPOSED:
        block = tl.load(place + item, mask=step < last, other=0)
    return found, block


@triton.jit
def load_block(
    values,
    block,
    k,
    k_inside,
    n,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    MASKED: tl.constexpr,
    LONG: tl.constexpr,
):
    """Tile [k, n] of a stored block; n counts its rows, or its columns if transposed."""
    if LONG:
        block = block.to(tl.int64)
    start = values + block * (BLOCK_ROWS * BLOCK_COLS)
    if TRANSPOSED:
        pointers = start + k[:, None] * BLOCK_COLS + n[None, :]
        mask = k_inside[:, None] & (n < BLOCK_COLS)[None, :]
    else:
        pointers = start + k[:, None] + n[None, :] * BLOCK_COLS
        mask = k_inside[:, None] & (n < BLOCK_ROWS)[None, :]
    if MASKED:
        return tl.load(pointers, mask=mask, other=0.0)
    return tl.load(pointers)


@triton.jit
def load_input(
    x,
    x_channels,
    channel,
    channel_inside,
    points,
    shift,
    x_size,
    SPATIAL: tl.constexpr,
    K_MASKED: tl.constexpr,
    LONG: tl.constexpr,
):
    """Tile [points, channels] of x, shifted by a tap; zero outside of the images."""
    inside, x_row, x_col, pixel = points
    if SPATIAL:
        tall, wide = x_row + shift[0], x_col + shift[1]
        inside = inside & (tall >= 0) & (tall < x_size[0]) & (wide >= 0) & (wide < x_size[1])
        pixel = pixel + (shift[0] * x_size[1] + shift[1])
    if LONG:
        pixel = pixel.to(tl.int64)
    mask = inside[:, None]
    if K_MASKED:
        mask = mask & channel_inside[None, :]
    return tl.load(x + pixel[:, None] * x_channels + channel[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(
    y,
    y_channels,
    bias,
    sums,
    pixel,
    pixel_inside,
    channel,
    channel_inside,
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    LONG: tl.constexpr,
):
    """Bias, ReLU and rounding at the store; NaN stays NaN, as torch's own ReLU has it."""
    if HAS_BIAS:
        sums += tl.load(bias + channel, mask=channel_inside, other=0.0).to(tl.float32)[None, :]
    if RELU:
        sums = tl.where(sums < 0, 0.0, sums)
    if LONG:
        pixel = pixel.to(tl.int64)
    pointers = y + pixel[:, None] * y_channels + channel[None, :]
    mask = pixel_inside[:, None] & channel_inside[None, :]
    tl.store(pointers, sums.to(y.dtype.element_ty), mask=mask)


@triton.jit
def block_product(
    y,  # [pixels of y, y_channels]
    x,  # [pixels of x, x_channels]
    values,  # [capacity, BLOCK_ROWS, BLOCK_COLS] in x's dtype
    bias,  # [y_channels], any dtype; not read unless HAS_BIAS
    pointer,  # int32 [rows + 1]: first list item of each row (a block of y's channels in a phase)
    source,  # int32 [capacity]: tap * x_blocks + block of x's channels in its group, per item
    place,  # int32 [capacity]: index of the item's block in values; not read unless TRANSPOSED
    order,  # int32 [rows]: the rows, long ones first, so that no long one is left for the end
    total,  # points of a phase: images * lattice_h * lattice_w
    rows,  # groups * phases * y_blocks, in this order
    y_blocks,  # blocks of y's channels per group
    x_blocks,
    y_group,  # channels per group
    x_group,
    y_channels,
    x_channels,
    lattice_h,  # points of one image and phase; all pixels of y unless TRANSPOSED
    lattice_w,
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
    TRANSPOSED: tl.constexpr,  # input gradient: blocks transposed, one phase per stride offset
    SPATIAL: tl.constexpr,  # False: point p of y reads point p of x (linear, 1x1 convolution)
    HAS_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products: "tf32" or "ieee"
    LONG: tl.constexpr,  # offsets do not fit into 32 bits
    K_MASKED: tl.constexpr,  # x's channels or the block do not divide into TILE_K, or PAIRED
    N_MASKED: tl.constexpr,  # the block's other side is not TILE_N
    PAIRED: tl.constexpr,  # two list steps per iteration
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    BLOCK_N: tl.constexpr = BLOCK_COLS if TRANSPOSED else BLOCK_ROWS
    BLOCK_K: tl.constexpr = BLOCK_ROWS if TRANSPOSED else BLOCK_COLS
    PARTS: tl.constexpr = (BLOCK_K + TILE_K - 1) // TILE_K  # list steps per block
    STRIDE: tl.constexpr = 2 if PAIRED else 1
    window = (taps_w, stride_h, stride_w, dilation_h, dilation_w, pad_h, pad_w)
    row = tl.load(order + tl.program_id(0) % rows)
    point = (tl.program_id(0) // rows) * TILE_M + tl.arange(0, TILE_M)
    inside = point < total
    group = row // y_blocks
    phase = (0, 0)
    pixel, exists, x_row, x_col, x_pixel = point, inside, point, point, point
    if SPATIAL:
        if TRANSPOSED:
            group, phase_h, phase_w = image_row_column(group, stride_h, stride_w)
            phase = (phase_h, phase_w)
        pixel, exists, x_row, x_col, x_pixel = points_of(
            point, phase, (lattice_h, lattice_w), (y_h, y_w), (x_h, x_w), window, TRANSPOSED
        )
    points = (inside, x_row, x_col, x_pixel)
    n = tl.arange(0, TILE_N)
    sums = tl.zeros((TILE_M, TILE_N), dtype=tl.float32)
    start = tl.load(pointer + row) * PARTS
    last = tl.load(pointer + row + 1) * PARTS
    # Items are read one iteration ahead: the loads of the tiles then depend on no load of their own
    # iteration, and all stages of the software pipeline are theirs.
    found, block = list_item(source, place, start, last, PARTS, TRANSPOSED)
    found1, block1 = list_item(source, place, start + 1, last, PARTS, TRANSPOSED)
    for step in tl.range(start, last, STRIDE):
        for u in tl.static_range(STRIDE):
            if u == 1:
                item, stored = found1, block1
            else:
                item, stored = found, block
            k = ((step + u) % PARTS) * TILE_K + tl.arange(0, TILE_K)
            # An odd last step finds no item: it has no channel inside.
            k_inside = k < tl.where(step + u < last, BLOCK_K, 0)
            channel = (item % x_blocks) * BLOCK_K + k
            shift = tap_shift(item // x_blocks, phase, window, TRANSPOSED)
            a = load_input(
                x,
                x_channels,
                group * x_group + channel,
                k_inside & (channel < x_group),
                points,
                shift,
                (x_h, x_w),
                SPATIAL,
                K_MASKED,
                LONG,
            )
            b = load_block(
                values,
                stored,
                k,
                k_inside,
                n,
                BLOCK_ROWS,
                BLOCK_COLS,
                TRANSPOSED,
                K_MASKED or N_MASKED,
                LONG,
            )
            sums = tl.dot(a, b, sums, input_precision=PRECISION)
        found, block = list_item(source, place, step + STRIDE, last, PARTS, TRANSPOSED)
        if PAIRED:
            found1, block1 = list_item(source, place, step + STRIDE + 1, last, PARTS, TRANSPOSED)
    channel = (row % y_blocks) * BLOCK_N + n
    n_inside = (n < BLOCK_N) & (channel < y_group)
    store_tile(
        y,
        y_channels,
        bias,
        sums,
        pixel,
        inside & exists,
        group * y_group + channel,
        n_inside,
        HAS_BIAS,
        RELU,
        LONG,
    )
