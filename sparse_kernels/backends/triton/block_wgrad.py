"""Launchers of the block weight gradient (SDDMM), linear and conv2d."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_kernels.backends.triton import unsupported_block
from sparse_kernels.backends.triton.block_config import (
    Problem,
    WgradConfig,
    default_wgrad,
    next_power,
    wgrad_parts,
)
from sparse_kernels.backends.triton.block_products import (
    blocks_per_group,
    image_size,
    is_spatial,
    window,
)
from sparse_kernels.backends.triton.kernels.block_wgrad import block_wgrad, sum_parts
from sparse_kernels.backends.triton.operands import (
    Launch,
    allows_tf32,
    batch_major,
    check_pixels,
    needs_long,
)
from sparse_kernels.geometry import Conv2dGeometry

_CHUNK = 1024


def linear_wgrad(
    grad: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    bh: int,
    bw: int,
    config: WgradConfig | None = None,
) -> Tensor:
    """dvalues [capacity, bh, bw] of grad [N, out] and x [N, in]; see the backend's function."""
    g = Conv2dGeometry(grad.shape[1], x.shape[1], 1, 1)
    return _wgrad("linear_wgrad", grad, x, crow, col, (bh, bw), g, config)


def conv2d_wgrad(
    grad: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    bh: int,
    bw: int,
    geometry: Sequence[int],
    config: WgradConfig | None = None,
) -> Tensor:
    """dvalues [capacity, bh, bw] of grad [N, C_out, H', W'] and x; see the backend's function."""
    return _wgrad("conv2d_wgrad", grad, x, crow, col, (bh, bw), Conv2dGeometry(*geometry), config)


def _wgrad(
    op: str,
    grad: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    block: tuple[int, int],
    g: Conv2dGeometry,
    config: WgradConfig | None,
) -> Tensor:
    reason = unsupported_block(*block)
    if reason:
        raise ValueError(f"{op}: the triton backend {reason}; choose another backend or block")
    grad, x = batch_major(grad), batch_major(x)
    points = grad.numel() // grad.shape[1]
    check_pixels(op, points, x.numel() // x.shape[1])
    shape = (col.shape[0], *block)
    if points == 0:
        return torch.zeros(shape, dtype=torch.float32, device=grad.device)
    problem = Problem(op, grad.dtype, block, points, allows_tf32(op))
    config = config or default_wgrad(problem)
    count = wgrad_parts(problem, config, col.shape[0], crow.shape[0] - 1)
    return in_parts(
        shape, crow, count, lambda to: wgrad_launch(problem, to, grad, x, crow, col, g, config)
    )


def in_parts(
    shape: tuple[int, ...], crow: Tensor, count: int, launch_of: Callable[[Tensor], Launch]
) -> Tensor:
    """The gradient of the values, float32 ``shape`` = [capacity, bh, bw].

    ``launch_of(parts)`` fills parts [count, *shape]; more than one part is summed, in order.
    """
    device = crow.device
    if count == 1:  # zeros for the tail beyond the stored blocks, which no program writes
        out = torch.zeros(shape, dtype=torch.float32, device=device)
        launch_of(out[None]).run()
        return out
    parts = torch.empty((count, *shape), dtype=torch.float32, device=device)
    launch_of(parts).run()
    out = torch.empty(shape, dtype=torch.float32, device=device)
    sum_launch(out, parts, crow).run()
    return out


def wgrad_launch(
    problem: Problem,
    parts: Tensor,
    grad: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    g: Conv2dGeometry,
    config: WgradConfig,
) -> Launch:
    """The launch that fills parts [count, capacity, bh, bw]; grad and x batch-major, not empty."""
    bh, bw = problem.block
    rows, capacity, count = crow.shape[0] - 1, col.shape[0], parts.shape[0]
    y_blocks, x_blocks = blocks_per_group(g, problem.block)
    y_size, x_size = image_size(grad), image_size(x)
    tiles = -(-problem.points // config.tile_m)
    arguments: dict[str, Any] = dict(
        out=parts,
        grad=grad,
        x=x,
        crow=crow,
        col=col,
        total=problem.points,
        steps=-(-tiles // count),
        rows=rows,
        capacity=capacity,
        y_blocks=y_blocks,
        x_blocks=x_blocks,
        y_group=g.out_channels // g.groups,
        x_group=g.in_channels // g.groups,
        y_channels=g.out_channels,
        x_channels=g.in_channels,
        y_h=y_size[0],
        y_w=y_size[1],
        x_h=x_size[0],
        x_w=x_size[1],
        **window(g),
        BLOCK_ROWS=bh,
        BLOCK_COLS=bw,
        SPATIAL=is_spatial(g),
        PRECISION="tf32" if problem.tf32 else "ieee",
        LONG=needs_long(grad, x, parts),
        TILE_M=config.tile_m,
        TILE_R=next_power(bh),
        SIDE=next_power(bw),
        PER=config.per,
    )
    grid = (capacity // config.per + rows, count)
    return Launch(block_wgrad, grid, arguments, config.num_warps, config.num_stages)


def sum_launch(out: Tensor, parts: Tensor, crow: Tensor) -> Launch:
    """The launch that sums parts [count, capacity, bh, bw] into out, in order."""
    capacity, bh, bw = out.shape
    arguments: dict[str, Any] = dict(
        out=out,
        parts=parts,
        crow=crow,
        rows=crow.shape[0] - 1,
        capacity=capacity,
        PARTS=parts.shape[0],
        BLOCK=bh * bw,
        CHUNK=_CHUNK,
    )
    return Launch(sum_parts, (-(-out.numel() // _CHUNK),), arguments, 4, 1)
