"""Launchers of the block product: linear, conv2d and their input gradients.

A linear layer is a 1x1 convolution over images of one pixel, so one kernel serves all four.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_kernels.backends.triton import unsupported_block
from sparse_kernels.backends.triton.block_config import (
    Problem,
    ProductConfig,
    default_product,
    sides,
)
from sparse_kernels.backends.triton.kernels.block_lists import column_lists
from sparse_kernels.backends.triton.kernels.block_product import block_product
from sparse_kernels.backends.triton.operands import (
    Launch,
    allows_tf32,
    batch_major,
    bisections,
    check_pixels,
    empty_images,
    needs_long,
    row_order,
)
from sparse_kernels.geometry import Conv2dGeometry

Index = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
Size = tuple[int, int]


class Lists(NamedTuple):
    """The stored blocks in the order in which a product reads them; see the kernel."""

    pointer: Tensor
    source: Tensor
    place: Tensor
    order: Tensor


def linear(
    x: Tensor,
    values: Tensor,
    index: Index,
    bias: Tensor | None,
    out_features: int,
    relu: bool,
    config: ProductConfig | None = None,
) -> Tensor:
    """y [N, out] of x [N, in]; see the backend's ``linear``."""
    x = batch_major(x)
    y = torch.empty((x.shape[0], out_features), dtype=x.dtype, device=x.device)
    g = Conv2dGeometry(out_features, x.shape[1], 1, 1)
    _forward("linear", y, x, values, index, bias, g, relu, config)
    return y


def linear_dgrad(
    grad: Tensor,
    values: Tensor,
    index: Index,
    in_features: int,
    config: ProductConfig | None = None,
) -> Tensor:
    """dx [N, in] of grad [N, out]; see the backend's ``linear_dgrad``."""
    grad = batch_major(grad)
    dx = torch.empty((grad.shape[0], in_features), dtype=grad.dtype, device=grad.device)
    g = Conv2dGeometry(grad.shape[1], in_features, 1, 1)
    _transposed("linear_dgrad", dx, grad, values, index, g, config)
    return dx


def conv2d(
    x: Tensor,
    values: Tensor,
    index: Index,
    bias: Tensor | None,
    geometry: Sequence[int],
    relu: bool,
    config: ProductConfig | None = None,
) -> Tensor:
    """y [N, C_out, H', W'] of x [N, C_in, H, W]; see the backend's ``conv2d``."""
    g = Conv2dGeometry(*geometry)
    x = batch_major(x)
    shape = (x.shape[0], g.out_channels, *g.output_size(x.shape[2], x.shape[3]))
    y = empty_images(shape, x)
    _forward("conv2d", y, x, values, index, bias, g, relu, config)
    return y


def conv2d_dgrad(
    grad: Tensor,
    values: Tensor,
    index: Index,
    size: Size,
    geometry: Sequence[int],
    config: ProductConfig | None = None,
) -> Tensor:
    """dx [N, C_in, *size] of grad [N, C_out, H', W']; see the backend's ``conv2d_dgrad``."""
    g = Conv2dGeometry(*geometry)
    grad = batch_major(grad)
    dx = empty_images((grad.shape[0], g.in_channels, *size), grad)
    _transposed("conv2d_dgrad", dx, grad, values, index, g, config)
    return dx


def _forward(
    op: str,
    y: Tensor,
    x: Tensor,
    values: Tensor,
    index: Index,
    bias: Tensor | None,
    g: Conv2dGeometry,
    relu: bool,
    config: ProductConfig | None,
) -> None:
    _check(op, values, y, x)
    if y.numel() == 0:
        return
    lists = forward_lists(index)
    product_launch(op, y, x, values.detach(), bias, lists, g, relu, config).run()


def _transposed(
    op: str,
    dx: Tensor,
    grad: Tensor,
    values: Tensor,
    index: Index,
    g: Conv2dGeometry,
    config: ProductConfig | None,
) -> None:
    _check(op, values, dx, grad)
    if dx.numel() == 0:
        return
    lists, sort = transposed_lists(index, g, (values.shape[1], values.shape[2]))
    if sort is not None:
        sort.run()
    product_launch(op, dx, grad, values.detach(), None, lists, g, False, config).run()


def _check(op: str, values: Tensor, *images: Tensor) -> None:
    reason = unsupported_block(values.shape[1], values.shape[2])
    if reason:
        raise ValueError(f"{op}: the triton backend {reason}; choose another backend or block")
    check_pixels(op, *(image.numel() // max(1, image.shape[1]) for image in images))


def is_spatial(g: Conv2dGeometry) -> bool:
    """Whether an output pixel reads anything but the input pixel of the same number."""
    plain = (1, 1, 1, 1, 0, 0, 0, 0)
    return plain != (
        *(g.kernel_height, g.kernel_width, g.stride_h, g.stride_w),
        *(g.pad_top, g.pad_left, g.pad_bottom, g.pad_right),
    )


def blocks_per_group(g: Conv2dGeometry, block: Size) -> Size:
    """Blocks of the output's and of the input's channels in one group."""
    bh, bw = block
    return -(-(g.out_channels // g.groups) // bh), -(-(g.in_channels // g.groups) // bw)


# -- lists -----------------------------------------------------------------------------------------


def forward_lists(index: Index) -> Lists:
    """The pattern's own rows: they are sorted by tap and input block already."""
    crow, col, _, _, _ = index
    return Lists(crow, col, col, row_order(crow, "rows", lambda: crow.diff()))


def transposed_lists(index: Index, g: Conv2dGeometry, block: Size) -> tuple[Lists, Launch | None]:
    """Lists by group, phase of the stride and input block, and the launch that fills them.

    Without taps, strides and groups the pattern's own columns are these lists, and nothing is
    launched. Scratch otherwise: 8 bytes per place in the pattern, 8 per list.
    """
    crow, col, t_crow, t_row, t_perm = index
    if not is_spatial(g) and g.groups == 1:
        order = row_order(t_crow, "columns", lambda: t_crow.diff())
        return Lists(t_crow, t_row, t_perm, order), None
    row_blocks, col_blocks = blocks_per_group(g, block)
    phases = g.stride_h * g.stride_w
    count = g.groups * phases * col_blocks
    order = row_order(t_crow, g, lambda: list_lengths(t_crow, g, col_blocks))
    scratch = torch.empty((count + 1 + 2 * col.shape[0],), dtype=torch.int32, device=col.device)
    source, place, pointer = scratch.split([col.shape[0], col.shape[0], count + 1])
    columns = g.taps * col_blocks
    arguments: dict[str, Any] = dict(
        pointer=pointer,
        source=source,
        place=place,
        crow=crow,
        t_crow=t_crow,
        t_row=t_row,
        t_perm=t_perm,
        columns=columns,
        col_blocks=col_blocks,
        row_blocks=row_blocks,
        groups=g.groups,
        phases=phases,
        **window(g),
        SEARCH=0 if g.groups == 1 else bisections(g.groups * row_blocks),
        CHUNK=256,
    )
    sort = Launch(column_lists, (g.groups * columns + count,), arguments, 4, 1)
    return Lists(pointer, source, place, order), sort


def list_lengths(t_crow: Tensor, g: Conv2dGeometry, col_blocks: int) -> Tensor:
    """Blocks per list, float32 [lists], as if the groups shared them evenly (only an order)."""
    per_tap = t_crow.diff().view(g.taps, col_blocks).float()
    phases: list[list[float]] = [[0.0] * g.taps for _ in range(g.stride_h * g.stride_w)]
    for tap in range(g.taps):
        ky, kx = divmod(tap, g.kernel_width)
        phase_h = (ky * g.dilation_h - g.pad_top) % g.stride_h
        phase_w = (kx * g.dilation_w - g.pad_left) % g.stride_w
        phases[phase_h * g.stride_w + phase_w][tap] = 1.0
    # Summed phase by phase: a table of 0 and 1 on the device would be a copy from pageable memory.
    rows = [
        sum((per_tap[tap] for tap, one in enumerate(row) if one), torch.zeros_like(per_tap[0]))
        for row in phases
    ]
    return torch.stack(rows).flatten().repeat(g.groups)


def window(g: Conv2dGeometry) -> dict[str, int]:
    """The kernels' arguments that say where a tap reads."""
    return dict(
        taps_w=g.kernel_width,
        stride_h=g.stride_h,
        stride_w=g.stride_w,
        dilation_h=g.dilation_h,
        dilation_w=g.dilation_w,
        pad_h=g.pad_top,
        pad_w=g.pad_left,
    )


# -- launch ----------------------------------------------------------------------------------------


def product_launch(
    op: str,
    y: Tensor,
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    lists: Lists,
    g: Conv2dGeometry,
    relu: bool,
    config: ProductConfig | None,
) -> Launch:
    """The launch that fills y (dx of a gradient) from x (its grad); both batch-major, not empty.

    ``values`` are cast to x's dtype here, once per call.
    """
    bh, bw = block = (values.shape[1], values.shape[2])
    transposed = op.endswith("_dgrad")
    values = values.to(x.dtype).contiguous()
    arguments = _shape_arguments(y, x, g, block, transposed)
    total, lists_count = arguments["total"], arguments["rows"]
    problem = Problem(op, x.dtype, block, total, allows_tf32(op), lists_count)
    config = config or default_product(problem)
    block_n, block_k = (bw, bh) if transposed else (bh, bw)
    tile_n = sides(problem)[0]
    uneven = arguments["x_group"] % block_k != 0 or block_k % config.tile_k != 0
    arguments.update(
        values=values,
        bias=values if bias is None else bias.detach().contiguous(),
        **lists._asdict(),
        **window(g),
        BLOCK_ROWS=bh,
        BLOCK_COLS=bw,
        TRANSPOSED=transposed,
        SPATIAL=is_spatial(g),
        HAS_BIAS=bias is not None,
        RELU=relu,
        PRECISION="tf32" if problem.tf32 else "ieee",
        LONG=needs_long(x, y, values),
        K_MASKED=config.paired or uneven,
        N_MASKED=block_n != tile_n,
        PAIRED=config.paired,
        TILE_M=config.tile_m,
        TILE_N=tile_n,
        TILE_K=config.tile_k,
    )
    grid = (lists_count * -(-total // config.tile_m),)
    return Launch(block_product, grid, arguments, config.num_warps, config.num_stages)


def _shape_arguments(
    y: Tensor, x: Tensor, g: Conv2dGeometry, block: Size, transposed: bool
) -> dict[str, Any]:
    """The kernel's images and the integers that describe them."""
    y_size, x_size = image_size(y), image_size(x)
    y_blocks, x_blocks = blocks_per_group(g, block)
    phases, lattice = 1, y_size
    if transposed:
        y_blocks, x_blocks = x_blocks, y_blocks
        phases = g.stride_h * g.stride_w
        lattice = (-(-y_size[0] // g.stride_h), -(-y_size[1] // g.stride_w))
    return dict(
        y=y,
        x=x,
        total=y.shape[0] * lattice[0] * lattice[1],
        rows=g.groups * phases * y_blocks,
        y_blocks=y_blocks,
        x_blocks=x_blocks,
        y_group=y.shape[1] // g.groups,
        x_group=x.shape[1] // g.groups,
        y_channels=y.shape[1],
        x_channels=x.shape[1],
        lattice_h=lattice[0],
        lattice_w=lattice[1],
        y_h=y_size[0],
        y_w=y_size[1],
        x_h=x_size[0],
        x_w=x_size[1],
    )


def image_size(images: Tensor) -> Size:
    """Height and width; a matrix [N, F] holds images of one pixel."""
    return (images.shape[2], images.shape[3]) if images.dim() == 4 else (1, 1)
