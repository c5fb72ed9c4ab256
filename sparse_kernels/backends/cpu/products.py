"""Sparse products and convolutions: one native launcher each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_kernels._load import native
from sparse_kernels.backends.cpu.convert import (
    activation,
    dense,
    empty_float,
    empty_matrix,
    empty_values,
    optional,
    pointer,
    result,
)
from sparse_kernels.backends.cpu.lists import lists_of
from sparse_kernels.geometry import Conv2dGeometry


def linear(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    t_crow: Tensor,
    t_row: Tensor,
    t_perm: Tensor,
    bias: Tensor | None,
    out_features: int,
    relu: bool,
) -> Tensor:
    """Y = X S^T (+ bias, ReLU); x [N, in] -> y [N, out], feature-major."""
    batch, in_features = x.shape
    capacity, bh, bw = values.shape
    xs, vs, bs = activation(x), dense(values), optional(bias)
    y = empty_matrix(batch, out_features, xs)
    native().linear(
        y.data_ptr(),
        xs.data_ptr(),
        vs.data_ptr(),
        pointer(bs),
        crow.data_ptr(),
        col.data_ptr(),
        out_features,
        in_features,
        bh,
        bw,
        capacity,
        batch,
        relu,
        torch.get_num_threads(),
        lists_of(col, crow),
    )
    return result(y, x.dtype)


def linear_dgrad(
    grad: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    t_crow: Tensor,
    t_row: Tensor,
    t_perm: Tensor,
    in_features: int,
) -> Tensor:
    """dX = dY S; grad [N, out] -> dx [N, in], feature-major."""
    batch, out_features = grad.shape
    capacity, bh, bw = values.shape
    gs, vs = activation(grad), dense(values)
    dx = empty_matrix(batch, in_features, gs)
    native().linear_dgrad(
        dx.data_ptr(),
        gs.data_ptr(),
        vs.data_ptr(),
        t_crow.data_ptr(),
        t_row.data_ptr(),
        t_perm.data_ptr(),
        out_features,
        in_features,
        bh,
        bw,
        capacity,
        batch,
        torch.get_num_threads(),
        lists_of(t_row, t_crow, t_perm),
    )
    return result(dx, grad.dtype)


def linear_wgrad(
    grad: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    t_crow: Tensor,
    t_row: Tensor,
    t_perm: Tensor,
    bh: int,
    bw: int,
) -> Tensor:
    """dV = (dY^T X) at the pattern, float32 [capacity, bh, bw] with a zero tail."""
    batch, out_features = grad.shape
    gs, xs = activation(grad), activation(x)
    capacity = col.shape[0]
    dv = empty_values(capacity, bh, bw, gs)
    native().linear_wgrad(
        dv.data_ptr(),
        gs.data_ptr(),
        xs.data_ptr(),
        crow.data_ptr(),
        col.data_ptr(),
        out_features,
        x.shape[1],
        bh,
        bw,
        capacity,
        batch,
        torch.get_num_threads(),
        lists_of(col, crow),
    )
    return dv


def _geometry(x_shape: Sequence[int], out_hw: Sequence[int], geometry: Sequence[int]) -> list[int]:
    return [x_shape[0], x_shape[2], x_shape[3], *out_hw, *geometry]


def conv2d(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    t_crow: Tensor,
    t_row: Tensor,
    t_perm: Tensor,
    bias: Tensor | None,
    geometry: Sequence[int],
    relu: bool,
) -> Tensor:
    """Sparse convolution; x [N, C, H, W] -> y [N, C_out, H_out, W_out], feature-major."""
    capacity, bh, bw = values.shape
    xs, vs, bs = activation(x), dense(values), optional(bias)
    out_hw = Conv2dGeometry(*geometry).output_size(x.shape[2], x.shape[3])
    y = empty_float((x.shape[0], geometry[0], *out_hw), x)
    native().conv2d(
        y.data_ptr(),
        xs.data_ptr(),
        vs.data_ptr(),
        pointer(bs),
        crow.data_ptr(),
        col.data_ptr(),
        _geometry(x.shape, out_hw, geometry),
        bh,
        bw,
        capacity,
        relu,
        torch.get_num_threads(),
        lists_of(col, crow),
    )
    return result(y, x.dtype)


def conv2d_dgrad(
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
) -> Tensor:
    """Gradient of the input, [N, C_in, H, W], feature-major."""
    capacity, bh, bw = values.shape
    gs, vs = activation(grad), dense(values)
    shape = (grad.shape[0], geometry[1], in_height, in_width)
    dx = empty_float(shape, grad)
    native().conv2d_dgrad(
        dx.data_ptr(),
        gs.data_ptr(),
        vs.data_ptr(),
        t_crow.data_ptr(),
        t_row.data_ptr(),
        t_perm.data_ptr(),
        _geometry(shape, grad.shape[2:], geometry),
        bh,
        bw,
        capacity,
        torch.get_num_threads(),
        lists_of(t_row, t_crow, t_perm),
    )
    return result(dx, grad.dtype)


def conv2d_wgrad(
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
) -> Tensor:
    """Gradient of the values, float32 [capacity, bh, bw] with a zero tail."""
    gs, xs = activation(grad), activation(x)
    capacity = col.shape[0]
    dv = empty_values(capacity, bh, bw, gs)
    native().conv2d_wgrad(
        dv.data_ptr(),
        gs.data_ptr(),
        xs.data_ptr(),
        crow.data_ptr(),
        col.data_ptr(),
        _geometry(x.shape, grad.shape[2:], geometry),
        bh,
        bw,
        capacity,
        torch.get_num_threads(),
        lists_of(col, crow),
    )
    return dv
