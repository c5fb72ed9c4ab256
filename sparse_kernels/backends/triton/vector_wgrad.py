"""Launchers of the weight gradient of element and V x 1 blocks (SDDMM), linear and conv2d."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_kernels.backends.triton.block_config import Problem, next_power, wgrad_parts
from sparse_kernels.backends.triton.block_products import is_spatial
from sparse_kernels.backends.triton.block_wgrad import in_parts
from sparse_kernels.backends.triton.kernels.vector_wgrad import vector_wgrad
from sparse_kernels.backends.triton.operands import (
    Launch,
    allows_tf32,
    check_pixels,
    needs_long,
)
from sparse_kernels.backends.triton.vector_config import VectorWgradConfig, default_vector_wgrad
from sparse_kernels.backends.triton.vector_products import image_arguments, points_of
from sparse_kernels.geometry import Conv2dGeometry
from sparse_kernels.layout import to_feature_major


def linear_wgrad(
    grad: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    side: int,
    config: VectorWgradConfig | None = None,
) -> Tensor:
    """dvalues [capacity, side, 1] of grad [N, out], x [N, in]; see the backend's function."""
    g = Conv2dGeometry(grad.shape[1], x.shape[1], 1, 1)
    return _wgrad("linear_wgrad", grad, x, crow, col, side, g, config)


def conv2d_wgrad(
    grad: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    side: int,
    geometry: Sequence[int],
    config: VectorWgradConfig | None = None,
) -> Tensor:
    """dvalues [capacity, side, 1] of grad [N, C_out, H', W'], x; see the backend's function."""
    return _wgrad("conv2d_wgrad", grad, x, crow, col, side, Conv2dGeometry(*geometry), config)


def _wgrad(
    op: str,
    grad: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    side: int,
    g: Conv2dGeometry,
    config: VectorWgradConfig | None,
) -> Tensor:
    points, shape = points_of(grad), (col.shape[0], side, 1)
    check_pixels(op, points, points_of(x))
    if points == 0:
        return torch.zeros(shape, dtype=torch.float32, device=grad.device)
    grad, x = to_feature_major(grad.detach()), to_feature_major(x.detach())
    problem = Problem(op, grad.dtype, (side, 1), points, allows_tf32(op))
    config = config or default_vector_wgrad(problem)
    count = wgrad_parts(problem, config, col.shape[0], crow.shape[0] - 1)
    return in_parts(
        shape, crow, count, lambda to: wgrad_launch(problem, to, grad, x, crow, col, g, config)
    )


def wgrad_launch(
    problem: Problem,
    parts: Tensor,
    grad: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    g: Conv2dGeometry,
    config: VectorWgradConfig,
) -> Launch:
    """The launch that fills parts [count, capacity, V, 1]; grad and x feature-major, not empty."""
    side, rows, capacity, count = problem.block[0], crow.shape[0] - 1, col.shape[0], parts.shape[0]
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
        **image_arguments(grad, x, g, side),
        BLOCK=side,
        TILE_V=next_power(max(side, 16)) if config.dot else next_power(side),
        SPATIAL=is_spatial(g),
        DOT=config.dot,
        PRECISION="tf32" if problem.tf32 else "ieee",
        LONG=needs_long(grad, x, parts),
        TILE_M=config.tile_m,
        PER=config.per,
    )
    grid = (capacity // config.per + rows, count)
    return Launch(vector_wgrad, grid, arguments, config.num_warps, config.num_stages)
