"""Backend `reference`: every operator in plain dense torch, the oracle of every test.

Any dtype and device. It EXPANDS the weight to a dense tensor; no other backend does. W below
stands for the six tensors values [capacity, bh, bw], crow, col, t_crow, t_row, t_perm (see
SparsityPattern). Activations may have any strides; outputs are feature-major (see layout). float16
and bfloat16 are computed in float32; weight gradients and statistics are then float32, activations
keep their dtype. `geometry` is the list of the 13 integers of Conv2dGeometry. Convolution means
cross-correlation with zero padding, as torch.nn.functional.conv2d has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from .. import _pattern_index as index
from ..geometry import Conv2dGeometry
from ..layout import empty_feature_major
from ._reference_dropout import dropout
from ._reference_norm import (
    batch_norm,
    batch_norm_backward,
    batch_norm_pool,
    batch_norm_pool_backward,
)
from ._reference_pool import (
    avg_pool2d,
    avg_pool2d_backward,
    compute_dtype,
    finish,
    max_pool2d,
    max_pool2d_backward,
)

__all__ = [
    "avg_pool2d",
    "avg_pool2d_backward",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_pool",
    "batch_norm_pool_backward",
    "conv2d",
    "conv2d_dgrad",
    "conv2d_wgrad",
    "conv2d_wgrad_dense",
    "dropout",
    "expand",
    "linear",
    "linear_dgrad",
    "linear_wgrad",
    "linear_wgrad_dense",
    "max_pool2d",
    "max_pool2d_backward",
    "supports",
]


def supports(
    op: str, x: Tensor, values: Tensor | None = None, block: tuple[int, int] | None = None
) -> str | None:
    """None: the reference computes every operator on everything (elsewhere: the reason why not)."""
    return None


# -- weights ---------------------------------------------------------------------------------------


def expand(
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    rows: int,
    cols: int,
    row_parts: int = 1,
    col_parts: int = 1,
) -> Tensor:
    """Dense matrix [rows, cols] of values [capacity, bh, bw] stored at (crow, col)."""
    grid = index.BlockGrid(rows, cols, values.shape[1], values.shape[2], row_parts, col_parts)
    return index.scatter(values, crow, col, int(crow[-1]), grid)


def _compress(
    dense: Tensor,
    crow: Tensor,
    col: Tensor,
    block: tuple[int, int],
    parts: tuple[int, int] = (1, 1),
) -> Tensor:
    """Values [capacity, bh, bw] of a dense matrix at (crow, col)."""
    grid = index.BlockGrid(dense.shape[0], dense.shape[1], *block, *parts)
    return index.gather(dense, crow, col, int(crow[-1]), grid)


def _conv_weight(values: Tensor, crow: Tensor, col: Tensor, g: Conv2dGeometry) -> Tensor:
    """Weight [C_out, C_in/groups, kh, kw] of values at (crow, col)."""
    rows, cols = g.matrix_shape
    matrix = expand(values, crow, col, rows, cols, g.groups, g.taps)
    taps_first = matrix.view(rows, g.kernel_height, g.kernel_width, cols // g.taps)
    return taps_first.permute(0, 3, 1, 2).contiguous()


# -- linear ----------------------------------------------------------------------------------------


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
    """y [N, out] = x [N, F] S^T + bias [out], rectified if `relu`."""
    dtype = compute_dtype(x, values)
    weight = expand(values.to(dtype), crow, col, out_features, x.shape[1])
    y = F.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype))
    return finish(y, x.dtype, relu)


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
    """dx [N, in] = grad [N, out] S."""
    dtype = compute_dtype(grad, values)
    weight = expand(values.to(dtype), crow, col, grad.shape[1], in_features)
    return finish(grad.to(dtype) @ weight, grad.dtype)


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
    """dvalues [capacity, bh, bw] = grad^T x at the pattern; zero tail, zero outside."""
    return _compress(linear_wgrad_dense(grad, x), crow, col, (bh, bw))


def linear_wgrad_dense(grad: Tensor, x: Tensor) -> Tensor:
    """Dense weight gradient [out, in] = grad [N, out]^T x [N, in]."""
    dtype = compute_dtype(grad, x)
    return grad.to(dtype).t() @ x.to(dtype)


# -- convolution -----------------------------------------------------------------------------------


def _pads(g: Conv2dGeometry) -> tuple[int, int, int, int]:
    """Padding in the order of F.pad: left, right, top, bottom."""
    return g.pad_left, g.pad_right, g.pad_top, g.pad_bottom


def _conv_arguments(g: Conv2dGeometry) -> dict[str, Any]:
    """Arguments of torch's convolutions after explicit padding (torch's own is symmetric)."""
    return {
        "stride": (g.stride_h, g.stride_w),
        "padding": 0,
        "dilation": (g.dilation_h, g.dilation_w),
        "groups": g.groups,
    }


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
    """y [N, C_out, H', W'] = conv2d(x [N, C_in, H, W], S) + bias [C_out], rectified if `relu`."""
    g = Conv2dGeometry(*geometry)
    dtype = compute_dtype(x, values)
    if (
        x.shape[0] == 0
    ):  # torch's convolution back ends differ in what they accept of an empty batch
        shape = (0, g.out_channels, *g.output_size(x.shape[2], x.shape[3]))
        return empty_feature_major(shape, x.dtype, x.device)
    weight = _conv_weight(values.to(dtype), crow, col, g)
    bias = None if bias is None else bias.to(dtype)
    y = F.conv2d(F.pad(x.to(dtype), _pads(g)), weight, bias, **_conv_arguments(g))
    return finish(y, x.dtype, relu)


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
    """dx [N, C_in, in_height, in_width] of the convolution, from grad [N, C_out, H', W']."""
    g = Conv2dGeometry(*geometry)
    shape = (grad.shape[0], g.in_channels, in_height, in_width)
    if grad.shape[0] == 0:
        return empty_feature_major(shape, grad.dtype, grad.device)
    dtype = compute_dtype(grad, values)
    tall = in_height + g.pad_top + g.pad_bottom
    wide = in_width + g.pad_left + g.pad_right
    padded = conv2d_input(
        (grad.shape[0], g.in_channels, tall, wide),
        _conv_weight(values.to(dtype), crow, col, g),
        grad.to(dtype),
        **_conv_arguments(g),
    )
    rows = slice(g.pad_top, g.pad_top + in_height)
    cols = slice(g.pad_left, g.pad_left + in_width)
    return finish(padded[:, :, rows, cols], grad.dtype)


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
    """dvalues [capacity, bh, bw] of the convolution; zero tail, zero outside of the matrix."""
    g = Conv2dGeometry(*geometry)
    dense = conv2d_wgrad_dense(grad, x, geometry)
    return _compress(dense, crow, col, (bh, bw), (g.groups, g.taps))


def conv2d_wgrad_dense(grad: Tensor, x: Tensor, geometry: Sequence[int]) -> Tensor:
    """Dense weight gradient as matrix [C_out, kh*kw*C_in/groups], taps major, channels fastest."""
    g = Conv2dGeometry(*geometry)
    dtype = compute_dtype(grad, x)
    if x.shape[0] == 0:
        return torch.zeros(g.matrix_shape, dtype=dtype, device=x.device)
    weight = conv2d_weight(
        F.pad(x.to(dtype), _pads(g)),
        (g.out_channels, g.in_channels // g.groups, g.kernel_height, g.kernel_width),
        grad.to(dtype),
        **_conv_arguments(g),
    )
    return weight.permute(0, 2, 3, 1).reshape(g.matrix_shape)
