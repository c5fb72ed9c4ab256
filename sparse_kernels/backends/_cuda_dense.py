"""Batch norm and pooling of the CUDA backend; see cuda.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_kernels.backends import _cuda_native
from sparse_kernels.backends._cuda_native import ELEMENTS, activation, as_float, pointer
from sparse_kernels.geometry import pool_output_size
from sparse_kernels.layout import empty_feature_major, to_feature_major

Pair = Sequence[int]


def _where(x: Tensor) -> list[int]:
    """Element type, device and stream, as csrc/bind_cuda_dense.cpp takes them."""
    return [ELEMENTS[x.dtype], *_cuda_native.place(x)]


def _sizes(x: Tensor) -> list[int]:
    """Channels, and elements of each."""
    return [x.shape[1], x.shape[0] * x.shape[2:].numel()]


def _vector(x: Tensor | None) -> Tensor | None:
    return None if x is None else as_float(x)


def _workspace(
    x: Tensor, training: bool, backward: bool, sizes: list[int] | None = None
) -> tuple[Tensor, int]:
    size = _cuda_native.native().cuda_batch_norm_workspace(sizes or _sizes(x), training, backward)
    return torch.empty(size // 4, dtype=torch.float32, device=x.device), size


def _statistics(
    x: Tensor, mean: Tensor | None, var: Tensor | None, training: bool
) -> tuple[Tensor, Tensor]:
    """Mean and variance for a kernel to write when training, else to read."""
    if training or mean is None or var is None:
        empty = torch.empty(x.shape[1], dtype=torch.float32, device=x.device)
        return empty, torch.empty_like(empty)
    # Copies: an operator's outputs must not alias its inputs.
    return (
        mean.detach().to(torch.float32, copy=True),
        var.detach().to(torch.float32, copy=True),
    )


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

    The offset is the bias, corrected for the rounding of the mean; statistics are float32.
    """
    xs, ws, bs = activation(x), _vector(weight), _vector(bias)
    rs = None if residual is None else activation(residual)
    mean, var = _statistics(x, mean, var, training)
    offset = torch.empty_like(mean)
    y = empty_feature_major(x.shape, x.dtype, x.device)
    workspace, size = _workspace(x, training, False)
    _cuda_native.native().cuda_batch_norm(
        y.data_ptr(),
        xs.data_ptr(),
        pointer(ws),
        pointer(bs),
        mean.data_ptr(),
        var.data_ptr(),
        offset.data_ptr(),
        pointer(rs),
        workspace.data_ptr(),
        size,
        _sizes(x),
        training,
        eps,
        relu,
        _where(x),
    )
    return y, mean, var, offset


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
    gs, xs = activation(grad.to(x.dtype)), activation(x)
    ys = activation(y) if relu and y is not None else None
    ws, offsets = _vector(weight), _vector(offset)
    means, vars_ = as_float(mean), as_float(var)
    dx = empty_feature_major(x.shape, x.dtype, x.device)
    dresidual = torch.empty_like(dx) if has_residual else None
    dweight, dbias = torch.empty_like(means), torch.empty_like(means)
    workspace, size = _workspace(x, training, True)
    _cuda_native.native().cuda_batch_norm_backward(
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
        workspace.data_ptr(),
        size,
        _sizes(x),
        training,
        eps,
        relu,
        _where(x),
    )
    return dx, dweight, dbias, x.new_empty(0) if dresidual is None else dresidual


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
    xs, ws, bs = activation(x), _vector(weight), _vector(bias)
    mean, var = _statistics(x, mean, var, training)
    rounding = torch.empty_like(mean)
    shape = (x.shape[0], x.shape[1], x.shape[2] // 2, x.shape[3] // 2)
    y = empty_feature_major(shape, x.dtype, x.device)
    argmax = empty_feature_major(shape, torch.uint8, x.device)
    workspace, size = _workspace(x, training, False)
    _cuda_native.native().cuda_batch_norm_pool(
        y.data_ptr(),
        argmax.data_ptr(),
        xs.data_ptr(),
        pointer(ws),
        pointer(bs),
        mean.data_ptr(),
        var.data_ptr(),
        rounding.data_ptr(),
        workspace.data_ptr(),
        size,
        list(x.shape),
        training,
        eps,
        _where(x),
    )
    return y, argmax, mean, var, rounding


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
    """Gradients of x, weight and bias, from what the forward pass returned."""
    gs, taps, xs = activation(grad.to(x.dtype)), to_feature_major(argmax), activation(x)
    ws, means, vars_, roundings = _vector(weight), as_float(mean), as_float(var), as_float(rounding)
    dx = empty_feature_major(x.shape, x.dtype, x.device)
    dweight, dbias = torch.empty_like(means), torch.empty_like(means)
    workspace, size = _workspace(x, training, True, _sizes(grad))
    _cuda_native.native().cuda_batch_norm_pool_backward(
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
        workspace.data_ptr(),
        size,
        list(x.shape),
        training,
        eps,
        _where(x),
    )
    return dx, dweight, dbias


# -- pooling ---------------------------------------------------------------------------------------


def max_pool2d(
    x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    """Maximum over windows: y and the winning tap of each window, uint8 (ky * kw + kx)."""
    xs = activation(x)
    out_hw = pool_output_size(x.shape[2:], kernel, stride, padding, dilation, ceil_mode)
    shape = (x.shape[0], x.shape[1], *out_hw)
    y = empty_feature_major(shape, x.dtype, x.device)
    argmax = empty_feature_major(shape, torch.uint8, x.device)
    dims = [*x.shape, *out_hw, *kernel, *stride, *padding, *dilation]
    _cuda_native.native().cuda_max_pool2d(
        False, y.data_ptr(), argmax.data_ptr(), xs.data_ptr(), dims, _where(x)
    )
    return y, argmax


def max_pool2d_backward(
    grad: Tensor,
    argmax: Tensor,
    in_height: int,
    in_width: int,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Tensor:
    """Gradient of the input, [N, C, in_height, in_width], feature-major."""
    gs, taps = activation(grad), to_feature_major(argmax)
    shape = (grad.shape[0], grad.shape[1], in_height, in_width)
    dx = empty_feature_major(shape, grad.dtype, grad.device)
    dims = [*shape, *grad.shape[2:], *kernel, *stride, *padding, *dilation]
    _cuda_native.native().cuda_max_pool2d(
        True, dx.data_ptr(), taps.data_ptr(), gs.data_ptr(), dims, _where(grad)
    )
    return dx


def avg_pool2d(
    x: Tensor,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Mean over windows, counted as torch.nn.functional.avg_pool2d counts."""
    xs = activation(x)
    out_hw = pool_output_size(x.shape[2:], kernel, stride, padding, (1, 1), ceil_mode)
    y = empty_feature_major((x.shape[0], x.shape[1], *out_hw), x.dtype, x.device)
    dims = [*x.shape, *out_hw, *kernel, *stride, *padding, 1, 1]
    tail = (dims, count_include_pad, divisor_override or 0, _where(x))
    _cuda_native.native().cuda_avg_pool2d(False, y.data_ptr(), xs.data_ptr(), *tail)
    return y


def avg_pool2d_backward(
    grad: Tensor,
    in_height: int,
    in_width: int,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Gradient of the input, [N, C, in_height, in_width], feature-major."""
    gs = activation(grad)
    shape = (grad.shape[0], grad.shape[1], in_height, in_width)
    dx = empty_feature_major(shape, grad.dtype, grad.device)
    dims = [*shape, *grad.shape[2:], *kernel, *stride, *padding, 1, 1]
    tail = (dims, count_include_pad, divisor_override or 0, _where(grad))
    _cuda_native.native().cuda_avg_pool2d(True, dx.data_ptr(), gs.data_ptr(), *tail)
    return dx
