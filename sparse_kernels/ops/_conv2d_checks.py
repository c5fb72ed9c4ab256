"""Checks of conv2d's operators, and what torch.compile is told of their results (fakes).

Geometry, images, index and block must fit before a backend is asked; every message names both
sides.  What follows from a geometry alone is worked out once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sparse_kernels.geometry import Conv2dGeometry
from sparse_kernels.ops._library import (
    blocks,
    check_activation,
    check_device,
    check_dtypes,
    check_index,
    check_values,
    empty_result,
    with_check,
)
from sparse_kernels.ops.linear import Index, weight_dtype


def geometry_of(op: str, geometry: Sequence[int]) -> Conv2dGeometry:
    """The 13 integers as a valid Conv2dGeometry. Raises ValueError naming `op` for others."""
    if len(geometry) != len(Conv2dGeometry._fields):
        raise ValueError(
            f"{op}: geometry must hold {len(Conv2dGeometry._fields)} integers "
            f"({', '.join(Conv2dGeometry._fields)}), got {len(geometry)}"
        )
    return _validated(tuple(geometry))


# A net has a few geometries and asks for each at every step; to examine one takes 6 us.
@functools.lru_cache(maxsize=1024)
def _validated(geometry: tuple[int, ...]) -> Conv2dGeometry:
    return Conv2dGeometry(*geometry).validate()


@functools.lru_cache(maxsize=1024)
def _grid(g: Conv2dGeometry, bh: int, bw: int) -> tuple[int, int]:
    """Rows and columns of blocks."""
    rows, cols = g.matrix_shape
    return blocks(rows, g.groups, bh), blocks(cols, g.taps, bw)


def _check_matrix(
    op: str, x: Tensor, block: tuple[int, int], index: Index, g: Conv2dGeometry
) -> None:
    bh, bw = block
    if bh < 1 or bw < 1:
        raise ValueError(f"{op}: both sides of the block must be at least 1, got {block}")
    check_index(op, x, index, *_grid(g, int(bh), int(bw)), index[1].shape[0])  # hashable


def _check_images(op: str, g: Conv2dGeometry, x_shape: Sequence[int], grad: Tensor | None) -> None:
    if x_shape[1] != g.in_channels:
        raise ValueError(
            f"{op}: input must have {g.in_channels} channels, got {x_shape[1]} in shape "
            f"{tuple(x_shape)}"
        )
    out = g.output_size(x_shape[2], x_shape[3])
    if out[0] < 1 or out[1] < 1:
        raise ValueError(
            f"{op}: an image of {x_shape[2]} x {x_shape[3]} pixels with padding "
            f"{(g.pad_top, g.pad_left, g.pad_bottom, g.pad_right)} is smaller than the kernel "
            f"{(g.kernel_height, g.kernel_width)} with dilation {(g.dilation_h, g.dilation_w)}"
        )
    if grad is not None:
        expected = (x_shape[0], g.out_channels, *out)
        if grad.shape != expected:
            raise ValueError(f"{op}: grad must have shape {expected}, got {tuple(grad.shape)}")


def check_forward(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    t_crow: Tensor,
    t_row: Tensor,
    t_perm: Tensor,
    bias: Tensor | None,
    probe: Tensor | None,
    geometry: Sequence[int],
    relu: bool,
) -> None:
    """Raise ValueError or TypeError unless these are arguments of "conv2d"."""
    check_activation("conv2d", "input", x, 4)
    check_values("conv2d", x, values)
    if (bias is not None and bias.device != x.device) or probe is not None:
        check_device("conv2d", x, bias=bias, probe=probe)
    g = geometry_of("conv2d", geometry)
    _check_images("conv2d", g, x.shape, None)
    if values.shape[0] != col.shape[0]:
        raise ValueError(
            f"conv2d: values and col must have one capacity, got {values.shape[0]} and "
            f"{col.shape[0]}"
        )
    block = (values.shape[1], values.shape[2])
    _check_matrix("conv2d", x, block, (crow, col, t_crow, t_row, t_perm), g)
    if bias is not None and bias.shape != (g.out_channels,):
        raise ValueError(
            f"conv2d: bias must have shape ({g.out_channels},), got {tuple(bias.shape)}"
        )
    if probe is not None and tuple(probe.shape) != g.matrix_shape:
        raise ValueError(
            f"conv2d: probe must have the weight matrix's shape {g.matrix_shape}, got "
            f"{tuple(probe.shape)}"
        )


@with_check(check_forward)
def fake_forward(x: Tensor, values: Tensor, *rest: Any) -> Tensor:
    """Result of "conv2d" without numbers: [N, C_out, H_out, W_out]."""
    g = Conv2dGeometry(*rest[-2])
    shape = (x.shape[0], g.out_channels, *g.output_size(x.shape[2], x.shape[3]))
    return empty_result("conv2d", shape, x, values)


def check_dgrad(
    grad: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    t_crow: Tensor,
    t_row: Tensor,
    t_perm: Tensor,
    in_height: int,
    in_width: int,
    geometry: Sequence[int],
) -> None:
    """Raise ValueError or TypeError unless these are arguments of "conv2d_dgrad"."""
    check_activation("conv2d_dgrad", "grad", grad, 4)
    check_values("conv2d_dgrad", grad, values)
    g = geometry_of("conv2d_dgrad", geometry)
    shape = (grad.shape[0], g.in_channels, in_height, in_width)
    _check_images("conv2d_dgrad", g, shape, grad)
    block = (values.shape[1], values.shape[2])
    _check_matrix("conv2d_dgrad", grad, block, (crow, col, t_crow, t_row, t_perm), g)


@with_check(check_dgrad)
def fake_dgrad(grad: Tensor, values: Tensor, *rest: Any) -> Tensor:
    """Result of "conv2d_dgrad" without numbers: [N, C_in, in_height, in_width]."""
    shape = (grad.shape[0], Conv2dGeometry(*rest[-1]).in_channels, *rest[-3:-1])
    return empty_result("conv2d_dgrad", shape, grad, values)


def _check_pair(op: str, grad: Tensor, x: Tensor, geometry: Sequence[int]) -> Conv2dGeometry:
    check_activation(op, "grad", grad, 4)
    check_activation(op, "input", x, 4)
    check_dtypes(op, grad, x)
    if grad.device != x.device:
        check_device(op, x, grad=grad)
    g = geometry_of(op, geometry)
    _check_images(op, g, x.shape, grad)
    return g


def check_wgrad(
    grad: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    t_crow: Tensor,
    t_row: Tensor,
    t_perm: Tensor,
    bh: int,
    bw: int,
    geometry: Sequence[int],
) -> None:
    """Raise ValueError or TypeError unless these are arguments of "conv2d_wgrad"."""
    g = _check_pair("conv2d_wgrad", grad, x, geometry)
    _check_matrix("conv2d_wgrad", grad, (bh, bw), (crow, col, t_crow, t_row, t_perm), g)


@with_check(check_wgrad)
def fake_wgrad(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    """Result of "conv2d_wgrad" without numbers: [capacity, bh, bw]."""
    return x.new_empty((rest[1].shape[0], rest[5], rest[6]), dtype=weight_dtype(x))


def fake_wgrad_dense(grad: Tensor, x: Tensor, geometry: Sequence[int]) -> Tensor:
    """Result of "conv2d_wgrad_dense" without numbers, arguments checked: the matrix."""
    g = _check_pair("conv2d_wgrad_dense", grad, x, geometry)
    return x.new_empty(g.matrix_shape, dtype=weight_dtype(x))
