"""Launchers of element and V x 1 blocks: linear, conv2d and their input gradients.

Feature-major throughout. A linear layer is a 1x1 convolution over images of one pixel, so one
kernel serves both.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sparse_kernels.backends.triton.block_config import Problem, next_power
from sparse_kernels.backends.triton.block_products import (
    Index,
    Size,
    blocks_per_group,
    image_size,
    is_spatial,
    list_lengths,
    window,
)
from sparse_kernels.backends.triton.kernels.vector_product import (
    vector_dgrad,
    vector_gather,
    vector_product,
)
from sparse_kernels.backends.triton.operands import (
    Launch,
    allows_tf32,
    bisections,
    check_pixels,
    needs_long,
    row_order,
)
from sparse_kernels.backends.triton.vector_config import VectorConfig, default_vector
from sparse_kernels.geometry import Conv2dGeometry
from sparse_kernels.layout import empty_feature_major, to_feature_major


def linear(
    x: Tensor,
    values: Tensor,
    index: Index,
    bias: Tensor | None,
    out_features: int,
    relu: bool,
    config: VectorConfig | None = None,
) -> Tensor:
    """y [N, out] of x [N, in]; see the backend's ``linear``."""
    g = Conv2dGeometry(out_features, x.shape[1], 1, 1)
    y = empty_feature_major((x.shape[0], out_features), x.dtype, x.device)
    return _forward("linear", y, x, values, index, bias, g, relu, config)


def linear_dgrad(
    grad: Tensor,
    values: Tensor,
    index: Index,
    in_features: int,
    config: VectorConfig | None = None,
) -> Tensor:
    """dx [N, in] of grad [N, out]; see the backend's ``linear_dgrad``."""
    g = Conv2dGeometry(grad.shape[1], in_features, 1, 1)
    dx = empty_feature_major((grad.shape[0], in_features), grad.dtype, grad.device)
    return _transposed("linear_dgrad", dx, grad, values, index, g, config)


def conv2d(
    x: Tensor,
    values: Tensor,
    index: Index,
    bias: Tensor | None,
    geometry: Sequence[int],
    relu: bool,
    config: VectorConfig | None = None,
) -> Tensor:
    """y [N, C_out, H', W'] of x [N, C_in, H, W]; see the backend's ``conv2d``."""
    g = Conv2dGeometry(*geometry)
    shape = (x.shape[0], g.out_channels, *g.output_size(x.shape[2], x.shape[3]))
    y = empty_feature_major(shape, x.dtype, x.device)
    return _forward("conv2d", y, x, values, index, bias, g, relu, config)


def conv2d_dgrad(
    grad: Tensor,
    values: Tensor,
    index: Index,
    size: Size,
    geometry: Sequence[int],
    config: VectorConfig | None = None,
) -> Tensor:
    """dx [N, C_in, *size] of grad [N, C_out, H', W']; see the backend's ``conv2d_dgrad``."""
    g = Conv2dGeometry(*geometry)
    shape = (grad.shape[0], g.in_channels, *size)
    dx = empty_feature_major(shape, grad.dtype, grad.device)
    return _transposed("conv2d_dgrad", dx, grad, values, index, g, config)


def _forward(
    op: str,
    y: Tensor,
    x: Tensor,
    values: Tensor,
    index: Index,
    bias: Tensor | None,
    g: Conv2dGeometry,
    relu: bool,
    config: VectorConfig | None,
) -> Tensor:
    check_pixels(op, points_of(y), points_of(x))
    if y.numel():
        x = to_feature_major(x.detach())
        forward_launch(op, y, x, values.detach(), index, bias, g, relu, config).run()
    return y


def _transposed(
    op: str,
    dx: Tensor,
    grad: Tensor,
    values: Tensor,
    index: Index,
    g: Conv2dGeometry,
    config: VectorConfig | None,
) -> Tensor:
    check_pixels(op, points_of(dx), points_of(grad))
    if dx.numel():
        grad = to_feature_major(grad.detach())
        dgrad_launch(op, dx, grad, values.detach(), index, g, config).run()
    return dx


def points_of(images: Tensor) -> int:
    """Numbers per channel: height * width * batch, or the batch of a matrix."""
    height, width = image_size(images)
    return images.shape[0] * height * width


def forward_launch(
    op: str,
    y: Tensor,
    x: Tensor,
    values: Tensor,
    index: Index,
    bias: Tensor | None,
    g: Conv2dGeometry,
    relu: bool,
    config: VectorConfig | None,
) -> Launch:
    """The launch that fills y from x; both feature-major, not empty.

    ``values`` are cast to x's dtype here, once per call.
    """
    crow, col = index[:2]
    values = values.to(x.dtype).contiguous()
    total, rows, side = points_of(y), crow.shape[0] - 1, values.shape[1]
    problem = Problem(op, x.dtype, (side, 1), total, allows_tf32(op), rows)
    config = config or default_vector(problem)
    arguments: dict[str, Any] = dict(
        y=y,
        x=x,
        values=values,
        bias=values if bias is None else bias.detach().contiguous(),
        crow=crow,
        col=col,
        order=row_order(crow, "rows", lambda: crow.diff()),
        total=total,
        rows=rows,
        **image_arguments(y, x, g, side),
        **tile_arguments(config, side, g, y, x, values),
        HAS_BIAS=bias is not None,
        RELU=relu,
    )
    if config.dot:
        arguments["PRECISION"] = "tf32" if problem.tf32 else "ieee"
    kernel = vector_gather if config.dot else vector_product
    grid = (rows * -(-total // config.tile_m),)
    return Launch(kernel, grid, arguments, config.num_warps, config.num_stages)


def tile_arguments(
    config: VectorConfig, side: int, g: Conv2dGeometry, *tensors: Tensor
) -> dict[str, Any]:
    """The compile-time constants that forward and input gradient share."""
    return dict(
        BLOCK=side,
        TILE_V=next_power(max(side, 16)) if config.dot else next_power(side),
        SPATIAL=is_spatial(g),
        LONG=needs_long(*tensors),
        UNROLL=config.unroll,
        TILE_M=config.tile_m,
    )


def image_arguments(y: Tensor, x: Tensor, g: Conv2dGeometry, side: int) -> dict[str, int]:
    """The integers by which forward and weight gradient find x's points."""
    x_size = image_size(x)
    return dict(
        x_points=points_of(x),
        row_blocks=blocks_per_group(g, (side, 1))[0],
        y_group=g.out_channels // g.groups,
        x_group=g.in_channels // g.groups,
        batch=y.shape[0],
        y_w=image_size(y)[1],
        x_h=x_size[0],
        x_w=x_size[1],
        **window(g),
    )


def dgrad_launch(
    op: str,
    dx: Tensor,
    grad: Tensor,
    values: Tensor,
    index: Index,
    g: Conv2dGeometry,
    config: VectorConfig | None,
) -> Launch:
    """The launch that fills dx from grad; both feature-major, not empty.

    ``values`` are cast to grad's dtype here, once per call. Raises ValueError for a ``config`` that
    asks for gathered rows, which only the forward product has.
    """
    _, _, t_crow, t_row, t_perm = index
    values = values.to(grad.dtype).contiguous()
    side = values.shape[1]
    shape = _dgrad_shape(dx, grad, g, side)
    total, rows = shape["total"], shape["rows"]
    problem = Problem(op, grad.dtype, (side, 1), total, allows_tf32(op), rows)
    config = config or default_vector(problem)
    if config.dot:
        raise ValueError(f"{op}: expected a configuration with dot=False, got {config}")
    lengths = functools.partial(list_lengths, t_crow, g, shape["dx_group"])
    arguments: dict[str, Any] = dict(
        dx=dx,
        grad=grad,
        values=values,
        t_crow=t_crow,
        t_row=t_row,
        t_perm=t_perm,
        order=row_order(t_crow, g, lengths),
        **shape,
        **window(g),
        SEARCH=0 if g.groups == 1 else bisections(g.groups * shape["row_blocks"]),
        **tile_arguments(config, side, g, dx, grad, values),
    )
    grid = (rows * -(-total // config.tile_m),)
    return Launch(vector_dgrad, grid, arguments, config.num_warps, config.num_stages)


def _dgrad_shape(dx: Tensor, grad: Tensor, g: Conv2dGeometry, side: int) -> dict[str, int]:
    """The integers that describe lists, phases and images of an input gradient."""
    dx_size, grad_size = image_size(dx), image_size(grad)
    row_blocks, dx_group = blocks_per_group(g, (side, 1))
    lattice = (-(-dx_size[0] // g.stride_h), -(-dx_size[1] // g.stride_w))
    return dict(
        total=dx.shape[0] * lattice[0] * lattice[1],
        dx_points=points_of(dx),
        grad_points=points_of(grad),
        rows=g.groups * g.stride_h * g.stride_w * dx_group,
        row_blocks=row_blocks,
        dx_group=dx_group,
        grad_group=g.out_channels // g.groups,
        batch=dx.shape[0],
        lattice_w=lattice[1],
        dx_h=dx_size[0],
        dx_w=dx_size[1],
        grad_h=grad_size[0],
        grad_w=grad_size[1],
        taps=g.taps,
    )
