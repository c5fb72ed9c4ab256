"""Dense weight gradients for the growth signal, straight from feature-major memory.

3x3 convolutions of stride 1 on images of 4x4 and more are computed by a native kernel from
transformed tiles, with 16 products where the direct sum has 36 (Winograd;
csrc/cpu/wgrad_tiles.cpp). Everything else is products of BLAS: in [C, H, W, N] memory the pixels of
an image row and the batch lie contiguous in each channel, so the gradient of one kernel position
(tap) is a sum of matrix products over image rows,

    dW_tap [C_out, C_in] += dY[C_out, run] @ X_shifted[C_in, run]^T,

where a run is the part of a row whose shifted pixels lie inside of the image: no conversion, no
copy, no product with padding. Short runs are first copied together, a rectangle of pixels at a
time. Where channels are few, or in groups, the shifted pixels of all taps are copied into one band,
[taps * C_in, pixels * N], and one product serves all taps.

Scratch: for tiles, 16/9 of the gradient itself, and about 4 MB of transformed pixels or those of
512 pixels and batch entries, if that is more. For products, a rectangle or band of at most
``_BAND`` floats (or one row of a short run, ``_MIN_BAND`` columns of a band, if that is more), or
partial sums (``_PARTS`` copies of a weight gradient of at most ``_SMALL`` channels a side). Sums
are cut in a fixed way; the order inside a product of BLAS is that of the library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_kernels._load import native
from sparse_kernels.backends.cpu.convert import activation
from sparse_kernels.backends.cpu.memory import empty_strided
from sparse_kernels.geometry import Conv2dGeometry

_BAND = 1 << 20
"""Floats of the band buffer: 4 MiB, so that the product finds it in the last-level cache."""
_MIN_CHANNELS = 32
"""Below this many input channels BLAS is slow on a single tap: all taps go in one product."""
_SHORT = 512
"""Runs (pixels * batch) shorter than this are copied together."""
_MIN_BAND = 512
"""Shortest useful band (pixels * batch): each product reads and writes the whole gradient."""
_SMALL = 256
"""Up to this many channels, products in parallel beat one product cut among the threads."""
_PARTS = 2
_TILE_GAIN = 1.4
"""Direct products per product of tiles from which tiles are faster: 1.56 for 4x4 images (measured
1.3 times as fast as BLAS), 1 for 2x2 (half as fast)."""
_TILE_BATCH = 16
"""Below this batch a tile is more addresses than numbers."""


def linear_wgrad_dense(grad: Tensor, x: Tensor) -> Tensor:
    """dW = dY^T X, float32 [out, in], of grad [N, out] and x [N, in]: for the growth signal only.

    Feature-major operands are read as they are: both are rows of N contiguous floats.
    """
    return grad.to(torch.float32).t() @ x.to(torch.float32)


def conv2d_wgrad_dense(grad: Tensor, x: Tensor, geometry: Sequence[int]) -> Tensor:
    """Dense weight gradient of a convolution, float32, for the growth signal only.

    grad [N, C_out, H_out, W_out], x [N, C_in, H, W] -> [C_out, kh*kw*C_in/groups], columns
    tap-major. Feature-major float32 operands are read as they are, others converted.
    """
    g = Conv2dGeometry(*geometry)
    if grad.numel() == 0 or x.numel() == 0:
        return torch.zeros(g.matrix_shape, dtype=torch.float32, device=x.device)
    dy, image = activation(grad).permute(1, 2, 3, 0), activation(x).permute(1, 2, 3, 0)
    if _tiles_are_faster(g, dy, image):
        return _by_tiles(g, dy, image)
    if g.groups > 1 or g.in_channels < _MIN_CHANNELS:
        return _by_bands(g, dy, image)
    small = max(g.out_channels, g.in_channels) <= _SMALL
    if small and g.stride_w == 1 and dy.shape[2] * dy.shape[3] >= _SHORT:
        return _by_halves(g, dy, image)
    return _by_taps(g, dy, image)


class _Tap(NamedTuple):
    """One kernel position: the output pixels that see the image through it, and where."""

    row: int  # first output row
    rows: int
    col: int  # first output column
    cols: int
    y: int  # image row seen by output row 0; may lie outside
    x: int


def _taps(g: Conv2dGeometry, dy: Tensor, image: Tensor) -> list[_Tap]:
    """The taps in column order; one that sees padding only has rows or cols 0."""
    (_, out_h, out_w, _), (_, height, width, _) = dy.shape, image.shape
    found = []
    for ky in range(g.kernel_height):
        y = ky * g.dilation_h - g.pad_top
        row, rows = _span(out_h, height, g.stride_h, y)
        for kx in range(g.kernel_width):
            x = kx * g.dilation_w - g.pad_left
            col, cols = _span(out_w, width, g.stride_w, x)
            found.append(_Tap(row, rows, col, cols, y, x))
    return found


def _span(outputs: int, size: int, stride: int, offset: int) -> tuple[int, int]:
    """First and number of the outputs o with 0 <= o * stride + offset < size."""
    first = max(0, -(offset // stride))
    end = min(outputs, (size - 1 - offset) // stride + 1)
    return first, max(0, end - first)


def _window(image: Tensor, g: Conv2dGeometry, tap: _Tap, row: int, rows: int, step: int) -> Tensor:
    """What outputs (row, row + step, ... (rows of them); all columns of the tap) see: a view
    [C_in, rows, cols, N]."""
    y, x = row * g.stride_h + tap.y, tap.col * g.stride_w + tap.x
    dy, dx = step * g.stride_h, g.stride_w
    return image[:, y : y + (rows - 1) * dy + 1 : dy, x : x + (tap.cols - 1) * dx + 1 : dx]


def _can_use_tiles(g: Conv2dGeometry) -> bool:
    """Whether the native kernel computes this geometry at all."""
    kernel, step = (g.kernel_height, g.kernel_width), (g.stride_h, g.stride_w)
    return kernel == (3, 3) and step == (g.dilation_h, g.dilation_w) == (1, 1) and g.groups == 1


def _tiles_are_faster(g: Conv2dGeometry, dy: Tensor, image: Tensor) -> bool:
    few = min(g.out_channels, g.in_channels) < _MIN_CHANNELS or dy.shape[3] < _TILE_BATCH
    if few or not _can_use_tiles(g):
        return False
    direct = sum(tap.rows * tap.cols for tap in _taps(g, dy, image))
    return direct >= _TILE_GAIN * 16 * -(-dy.shape[1] // 2) * -(-dy.shape[2] // 2)


def _by_tiles(g: Conv2dGeometry, dy: Tensor, image: Tensor) -> Tensor:
    """3x3, stride 1: transformed tiles of 2x2 output pixels, 16 products instead of 36."""
    (_, out_h, out_w, batch), (_, height, width, _) = dy.shape, image.shape
    channels = (g.out_channels, g.in_channels)
    sizes = (batch, *channels, height, width, g.pad_top, g.pad_left, out_h, out_w)
    floats = native().wgrad_tiles_scratch(*sizes)
    scratch = empty_strided((floats,), (1,), floats)
    out = torch.empty(g.matrix_shape, dtype=torch.float32, device=dy.device)
    pointers = (out.data_ptr(), dy.data_ptr(), image.data_ptr(), scratch.data_ptr())
    native().wgrad_tiles(*pointers, floats, *sizes, torch.get_num_threads())
    return out


def _by_taps(g: Conv2dGeometry, dy: Tensor, image: Tensor) -> Tensor:
    """Many channels, or short runs: one product per tap and run, for all threads together."""
    batch = dy.shape[3]
    out = torch.empty(g.matrix_shape, dtype=torch.float32, device=dy.device)
    for tap, columns in zip(_taps(g, dy, image), out.split(g.in_channels, 1), strict=True):
        if not tap.rows or not tap.cols:
            columns.zero_()
            continue
        beta = 0
        count, run = 1, tap.cols * batch
        # Rows of full width lie one after another: one run.
        if tap.cols == dy.shape[2] == image.shape[2] and g.stride_h == 1:
            count = tap.rows
        elif run < _SHORT:
            count = max(1, _BAND // ((g.out_channels + g.in_channels) * run))
        for row in range(tap.row, tap.row + tap.rows, count):
            rows = min(count, tap.row + tap.rows - row)
            ours = dy[:, row : row + rows, tap.col : tap.col + tap.cols]
            theirs = _window(image, g, tap, row, rows, 1)
            columns.addmm_(ours.flatten(1), theirs.flatten(1).t(), beta=beta)
            beta = 1
    return out


def _by_halves(g: Conv2dGeometry, dy: Tensor, image: Tensor) -> Tensor:
    """Fewer channels: rows r and r + half in parallel, all taps of them while they are in cache."""
    taps, out_h = _taps(g, dy, image), dy.shape[1]
    sums = dy.new_zeros(g.taps, _PARTS, g.out_channels, g.in_channels)
    step = -(-out_h // _PARTS)
    for start in range(step):
        for tap, total in zip(taps, sums, strict=True):
            # Part p holds output row start + p * step: those inside of the tap's rows.
            first, count = _span(_PARTS, tap.rows, step, start - tap.row)
            if not count or not tap.cols:
                continue
            row = start + first * step
            ours = dy[:, row : row + (count - 1) * step + 1 : step, tap.col : tap.col + tap.cols]
            theirs = _window(image, g, tap, row, count, step)
            total[first : first + count].baddbmm_(
                ours.flatten(2).transpose(0, 1), theirs.flatten(2).permute(1, 2, 0)
            )
    return sums.sum(1).permute(1, 0, 2).reshape(g.matrix_shape)


def _by_bands(g: Conv2dGeometry, dy: Tensor, image: Tensor) -> Tensor:
    """Anything: bands of output pixels, the pixels that all taps see copied side by side."""
    (_, out_h, out_w, batch), groups = dy.shape, g.groups
    columns = g.matrix_shape[1]
    parts = _PARTS if batch % _PARTS == 0 and dy.shape[0] * columns <= _SMALL**2 else 1
    sums = dy.new_zeros(groups, parts, g.out_channels // groups, columns)
    pixels = max(_BAND // (columns * groups * batch), -(-_MIN_BAND // batch))
    rows, cols = max(1, min(out_h, pixels // out_w)), min(out_w, pixels)
    buffer = dy.new_empty(groups * columns * rows * cols * batch)
    taps = _taps(g, dy, image)
    for row in range(0, out_h, rows):
        for col in range(0, out_w, cols):
            ours = dy[:, row : row + rows, col : col + cols]
            shape = (groups, g.taps, g.in_channels // groups, *ours.shape[1:])
            band = buffer[: columns * groups * ours[0].numel()].view(shape)
            for i, tap in enumerate(taps):
                _fill(band[:, i], image, g, tap, row, col)
            a = ours.reshape(groups, -1, parts, ours[0].numel() // parts)
            b = band.view(groups, columns, parts, -1)
            _add_products(sums, a, b)
    return sums.sum(1).view(g.matrix_shape)


def _add_products(sums: Tensor, a: Tensor, b: Tensor) -> None:
    """sums [groups, parts, M, N] += a [groups, M, parts, K] @ b [groups, N, parts, K]^T."""
    if a.shape[2] == 1:
        sums[:, 0].baddbmm_(a[:, :, 0], b[:, :, 0].transpose(1, 2))
        return
    for total, ours, theirs in zip(sums, a, b, strict=True):
        total.baddbmm_(ours.transpose(0, 1), theirs.permute(1, 2, 0))


def _fill(band: Tensor, image: Tensor, g: Conv2dGeometry, tap: _Tap, row: int, col: int) -> None:
    """band [groups, channels, rows, cols, N]: what output pixels from (row, col) see through tap;
    0 outside of the image."""
    top, rows = _clip(tap.row, tap.rows, row, band.shape[2])
    left, cols = _clip(tap.col, tap.cols, col, band.shape[3])
    if not rows or not cols:
        band.zero_()
        return
    band[:, :, :top].zero_()
    band[:, :, top + rows :].zero_()
    inner = band[:, :, top : top + rows]
    inner[:, :, :, :left].zero_()
    inner[:, :, :, left + cols :].zero_()
    here = tap._replace(col=col + left, cols=cols)
    seen = _window(image, g, here, row + top, rows, 1)
    inner[:, :, :, left : left + cols].copy_(seen.unflatten(0, band.shape[:2]))


def _clip(first: int, count: int, start: int, length: int) -> tuple[int, int]:
    """First (relative to start) and number of [first, first + count) inside [start, + length)."""
    begin = max(first, start)
    return begin - start, max(0, min(first + count, start + length) - begin)
