"""Pooling by torch's channels_last kernels; see the package's docstring."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_kernels.backends.torch_ops.layouts import images, of_images


def _starts(windows: int, stride: int, padding: int, like: Tensor) -> Tensor:
    """First pixel (maybe in the padding) of each window along one axis."""
    return torch.arange(windows, device=like.device) * stride - padding


def max_pool2d(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Tensor, Tensor]:
    """(y, argmax uint8), both [N, C, H', W']; argmax is the maximum's tap ky * kw + kx."""
    y, flat = F.max_pool2d_with_indices(
        images(x), list(kernel), list(stride), list(padding), list(dilation), ceil_mode
    )
    width = x.shape[3]
    rows = _starts(y.shape[2], stride[0], padding[0], x)[:, None]
    columns = _starts(y.shape[3], stride[1], padding[1], x)
    ky = (flat // width - rows) // dilation[0]
    kx = (flat % width - columns) // dilation[1]
    return of_images(y), of_images((ky * kernel[1] + kx).to(torch.uint8))


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
    """dx [N, C, in_height, in_width]: each gradient goes to its window's maximum.

    Overlapping windows are added by torch in no fixed order (its atomics, on a GPU); windows that
    do not overlap are exact.
    """
    grads, tap = images(grad), images(argmax).long()
    rows = _starts(grad.shape[2], stride[0], padding[0], grad)[:, None]
    columns = _starts(grad.shape[3], stride[1], padding[1], grad)
    row = (tap // kernel[1]) * dilation[0] + rows
    flat = row * in_width + (tap % kernel[1]) * dilation[1] + columns
    shape = (grads.shape[0], grads.shape[1], in_height, in_width)
    # torch asks for the input, and reads its shape and layout only.
    like = torch.empty(
        shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last
    )
    # Windows in ceil mode may begin where the floor would end: what counts is grad's shape.
    ceil = list(grad.shape[2:]) != _floor_sizes((in_height, in_width), kernel, stride, padding,
                                                dilation)  # fmt: skip
    dx = torch.ops.aten.max_pool2d_with_indices_backward(
        grads, like, list(kernel), list(stride), list(padding), list(dilation), ceil, flat
    )
    return of_images(dx)


def _floor_sizes(
    image: tuple[int, int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Height and width of the result without ceil_mode."""
    axes = zip(image, kernel, stride, padding, dilation, strict=True)
    return [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in axes]


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
    y = F.avg_pool2d(
        images(x),
        list(kernel),
        list(stride),
        list(padding),
        ceil_mode,
        count_include_pad,
        divisor_override,
    )
    return of_images(y)


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
    grads = images(grad)
    shape = (grads.shape[0], grads.shape[1], in_height, in_width)
    like = torch.empty(
        shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last
    )
    dx = torch.ops.aten.avg_pool2d_backward(
        grads,
        like,
        list(kernel),
        list(stride),
        list(padding),
        ceil_mode,
        count_include_pad,
        divisor_override,
    )
    return of_images(dx)
