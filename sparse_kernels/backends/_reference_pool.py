"""Pooling of the reference backend, and what its operators share; see reference.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import empty_feature_major


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Widest dtype of the tensors, at least float32: half types accumulate in float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def finish(y: Tensor, dtype: torch.dtype, relu: bool = False) -> Tensor:
    """`y` as a new feature-major tensor of `dtype`, rectified if asked."""
    out = empty_feature_major(y.shape, dtype, y.device)
    return out.copy_(y.relu() if relu else y)


def max_pool2d(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    """(y, argmax uint8), both [N, C, H', W']; argmax is the maximum's tap ky*kw + kx."""
    taps = kernel[0] * kernel[1]
    if taps > 256:
        raise ValueError(f"kernel: expected at most 256 taps (argmax is uint8), got {taps}")
    y, flat = F.max_pool2d_with_indices(
        x, list(kernel), list(stride), list(padding), list(dilation), ceil_mode
    )
    row, column = flat // x.shape[3], flat % x.shape[3]
    ky = (row - _window_starts(y.shape[2], stride[0], padding[0], x)[:, None]) // dilation[0]
    kx = (column - _window_starts(y.shape[3], stride[1], padding[1], x)) // dilation[1]
    return finish(y, x.dtype), finish(ky * kernel[1] + kx, torch.uint8)


def _window_starts(windows: int, stride: int, padding: int, like: Tensor) -> Tensor:
    """First pixel (may be in the padding) of each window along one axis."""
    return torch.arange(windows, device=like.device) * stride - padding


def max_pool2d_backward(
    grad: Tensor,
    argmax: Tensor,
    in_height: int,
    in_width: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """dx [N, C, in_height, in_width]: each gradient goes to its window's maximum."""
    batch, channels, out_h, out_w = grad.shape
    tap = argmax.long()
    ky, kx = tap // kernel[1], tap % kernel[1]
    row = ky * dilation[0] + _window_starts(out_h, stride[0], padding[0], grad)[:, None]
    column = kx * dilation[1] + _window_starts(out_w, stride[1], padding[1], grad)
    pixel = (row * in_width + column).flatten(2)
    dtype = compute_dtype(grad)
    dx = torch.zeros(batch, channels, in_height * in_width, dtype=dtype, device=grad.device)
    dx.scatter_add_(2, pixel, grad.to(dtype).flatten(2))
    return finish(dx.view(batch, channels, in_height, in_width), grad.dtype)


def avg_pool2d(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """y [N, C, H', W']: window sums over the divisor, as torch.nn.functional.avg_pool2d."""
    wide = x.to(compute_dtype(x))
    y = F.avg_pool2d(
        wide,
        list(kernel),
        list(stride),
        list(padding),
        ceil_mode,
        count_include_pad,
        divisor_override,
    )
    return finish(y, x.dtype)


def avg_pool2d_backward(
    grad: Tensor,
    in_height: int,
    in_width: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """dx [N, C, in_height, in_width] of avg_pool2d."""
    shape = (grad.shape[0], grad.shape[1], in_height, in_width)
    if grad.numel() == 0:
        return finish(grad.new_zeros(shape), grad.dtype)
    dtype = compute_dtype(grad)
    dx = torch.ops.aten.avg_pool2d_backward(
        grad.to(dtype),
        torch.zeros((), dtype=dtype, device=grad.device).expand(shape),
        list(kernel),
        list(stride),
        list(padding),
        ceil_mode,
        count_include_pad,
        divisor_override,
    )
    return finish(dx, grad.dtype)
