"""Pooling over feature-major activations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_kernels._load import native
from sparse_kernels.backends.cpu.convert import activation, empty_float, result
from sparse_kernels.geometry import pool_output_size
from sparse_kernels.layout import empty_feature_major, to_feature_major

Pair = Sequence[int]


def _pool_dims(
    shape: Sequence[int], out_hw: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair
) -> list[int]:
    return [*shape, *out_hw, *kernel, *stride, *padding, *dilation]


def max_pool2d(
    x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> tuple[Tensor, Tensor]:
    """Maximum over windows: y and the winning tap of each window, uint8 (ky * kw + kx)."""
    xs = activation(x)
    out_hw = pool_output_size(x.shape[2:], kernel, stride, padding, dilation, ceil_mode)
    shape = (x.shape[0], x.shape[1], *out_hw)
    y = empty_float(shape, x)
    argmax = empty_feature_major(shape, torch.uint8, x.device)
    dims = _pool_dims(x.shape, out_hw, kernel, stride, padding, dilation)
    native().max_pool2d(
        y.data_ptr(), argmax.data_ptr(), xs.data_ptr(), dims, torch.get_num_threads()
    )
    return result(y, x.dtype), argmax


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
    dx = empty_float(shape, grad)
    dims = _pool_dims(shape, grad.shape[2:], kernel, stride, padding, dilation)
    native().max_pool2d_backward(
        dx.data_ptr(), gs.data_ptr(), taps.data_ptr(), dims, torch.get_num_threads()
    )
    return result(dx, grad.dtype)


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
    y = empty_float((x.shape[0], x.shape[1], *out_hw), x)
    native().avg_pool2d(
        y.data_ptr(),
        xs.data_ptr(),
        _pool_dims(x.shape, out_hw, kernel, stride, padding, (1, 1)),
        count_include_pad,
        divisor_override or 0,
        torch.get_num_threads(),
    )
    return result(y, x.dtype)


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
    dx = empty_float(shape, grad)
    native().avg_pool2d_backward(
        dx.data_ptr(),
        gs.data_ptr(),
        _pool_dims(shape, grad.shape[2:], kernel, stride, padding, (1, 1)),
        count_include_pad,
        divisor_override or 0,
        torch.get_num_threads(),
    )
    return result(dx, grad.dtype)
