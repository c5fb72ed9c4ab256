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


def _workspace(x: Tensor, training: bool, backward: bool) -> tuple[Tensor, int]:
    size = _cuda_native.native().cuda_batch_norm_workspace(_sizes(x), training, backward)
    return torch.empty(size // 4, dtype=torch.float32, device=x.device), size


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
    if training or mean is None or var is None:
        mean = torch.empty(x.shape[1], dtype=torch.float32, device=x.device)
        var = torch.empty_like(mean)
    else:  # copies: an operator's outputs must not alias its inputs
        mean = mean.detach().to(torch.float32, copy=True)
        var = var.detach().to(torch.float32, copy=True)
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
