"""Batch norm over feature-major activations, with ReLU and residual in the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_kernels._load import native
from sparse_kernels.backends.cpu.convert import (
    activation,
    dense,
    empty_float,
    optional,
    pointer,
    result,
)
from sparse_kernels.layout import empty_feature_major, to_feature_major


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch norm (+ residual, ReLU) of [N, C] or [N, C, H, W]: y, mean, biased variance, offset.

    y = relu?((x - mean) * scale + offset [+ residual]) with scale = weight / sqrt(var + eps): the
    offset is the bias, corrected for the rounding of the mean.
    """
    xs = activation(x)
    ws, bs = optional(weight), optional(bias)
    rs = None if residual is None else activation(residual)
    channels = x.shape[1]
    if training or mean is None or var is None:
        mean = torch.empty(channels, dtype=torch.float32, device=x.device)
        var = torch.empty_like(mean)
    else:  # copies: an operator's outputs must not alias its inputs
        mean = mean.detach().to(torch.float32, copy=True)
        var = var.detach().to(torch.float32, copy=True)
    offset = torch.empty_like(mean)
    y = empty_float(x.shape, x)
    native().batch_norm_forward(
        y.data_ptr(),
        xs.data_ptr(),
        pointer(ws),
        pointer(bs),
        mean.data_ptr(),
        var.data_ptr(),
        offset.data_ptr(),
        pointer(rs),
        x.shape[0],
        channels,
        x.shape[2:].numel(),
        training,
        eps,
        relu,
        torch.get_num_threads(),
    )
    return result(y, x.dtype), mean, var, offset


def batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    offset: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
    has_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and residual (empty without one).

    The ReLU's mask is that of y, or, without y, recomputed from x by the forward pass's expression.
    """
    gs, xs = activation(grad), activation(x)
    ys = activation(y) if relu and y is not None else None
    ws, offsets = optional(weight), optional(offset)
    means, vars_ = dense(mean), dense(var)
    dx = empty_float(x.shape, x)
    dweight, dbias = torch.empty_like(means), torch.empty_like(means)
    dresidual = empty_float(x.shape, x) if has_residual else None
    native().batch_norm_backward(
        dx.data_ptr(),
        dweight.data_ptr(),
        dbias.data_ptr(),
        pointer(dresidual),
        gs.data_ptr(),
        xs.data_ptr(),
        pointer(ys),
        pointer(ws),
        means.data_ptr(),
        vars_.data_ptr(),
        pointer(offsets),
        x.shape[0],
        x.shape[1],
        x.shape[2:].numel(),
        training,
        eps,
        relu,
        torch.get_num_threads(),
    )
    left = x.new_empty(0) if dresidual is None else result(dresidual, x.dtype)
    return result(dx, x.dtype), dweight, dbias, left


def batch_norm_pool(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Maximum of relu(norm(x)) over 2x2 pixels: y, argmax, mean, biased variance, rounding.

    argmax is uint8, 2 * ky + kx, or 255 where y is 0; the exact mean is mean + rounding.
    """
    xs, ws, bs = activation(x), optional(weight), optional(bias)
    channels = x.shape[1]
    if training or mean is None or var is None:
        mean = torch.empty(channels, dtype=torch.float32, device=x.device)
        var = torch.empty_like(mean)
    else:  # copies: an operator's outputs must not alias its inputs
        mean = mean.detach().to(torch.float32, copy=True)
        var = var.detach().to(torch.float32, copy=True)
    rounding = torch.empty_like(mean)
    shape = (x.shape[0], channels, x.shape[2] // 2, x.shape[3] // 2)
    y, argmax = empty_float(shape, x), empty_feature_major(shape, torch.uint8, x.device)
    native().batch_norm_pool(
        y.data_ptr(),
        argmax.data_ptr(),
        xs.data_ptr(),
        pointer(ws),
        pointer(bs),
        mean.data_ptr(),
        var.data_ptr(),
        rounding.data_ptr(),
        list(x.shape),
        training,
        eps,
        torch.get_num_threads(),
    )
    return result(y, x.dtype), argmax, mean, var, rounding


def batch_norm_pool_backward(
    grad: Tensor,
    argmax: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    rounding: Tensor,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    gs, xs, taps = activation(grad), activation(x), to_feature_major(argmax)
    ws, means, vars_, roundings = optional(weight), dense(mean), dense(var), dense(rounding)
    dx = empty_float(x.shape, x)
    dweight, dbias = torch.empty_like(means), torch.empty_like(means)
    native().batch_norm_pool_backward(
        dx.data_ptr(),
        dweight.data_ptr(),
        dbias.data_ptr(),
        gs.data_ptr(),
        taps.data_ptr(),
        xs.data_ptr(),
        pointer(ws),
        means.data_ptr(),
        vars_.data_ptr(),
        roundings.data_ptr(),
        list(x.shape),
        training,
        eps,
        torch.get_num_threads(),
    )
    return result(dx, x.dtype), dweight, dbias
