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
    "conv2d",
    "conv2d_dgrad",
    "conv2d_wgrad",
    "conv2d_wgrad_dense",
    "expand",
    "linear",
    "linear_dgrad",
    "linear_wgrad",
    "linear_wgrad_dense",
    "max_pool2d",
    "max_pool2d_backward",
    "supports",
]


def supports(op: str, x: Tensor, values: Tensor | None = None) -> str | None:
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


# -- batch norm ------------------------------------------------------------------------------------


def _per_channel(statistic: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Vector [C] shaped to broadcast against x [N, C, ...]."""
    return statistic.to(dtype).view(1, -1, *([1] * (x.ndim - 2)))


def _normalised(
    x: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, offset: Tensor, eps: float
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + offset, in the dtype of the statistics."""
    dtype = mean.dtype
    y = x.to(dtype) - _per_channel(mean, x, dtype)
    y = y * (_per_channel(var, x, dtype) + eps).rsqrt()
    if weight is not None:
        y = y * _per_channel(weight, x, dtype)
    return y + _per_channel(offset, x, dtype)


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
    """(y, mean [C], var [C], offset [C]) with y = relu?((x - mean) / sqrt(var + eps) * weight +
    offset [+ residual]).

    x is [N, C] or [N, C, H, W]. Training: mean and biased variance of the batch (of an empty
    batch: NaN); otherwise the given ones are used and returned. The offset is the bias; the native
    backend corrects it for the rounding of the mean. Method: Ioffe & Szegedy, arXiv 1502.03167.
    """
    dtype = compute_dtype(x)
    if training:
        var, mean = torch.var_mean(x.to(dtype), dim=_all_but_channels(x), correction=0)
    elif mean is None or var is None:
        raise ValueError(
            "batch_norm: expected mean and var outside of training, got None; pass them"
        )
    # Copies, because the outputs of an operator must not alias its inputs.
    mean, var = mean.to(dtype, copy=True), var.to(dtype, copy=True)
    offset = torch.zeros_like(mean) if bias is None else bias.to(dtype, copy=True)
    y = _normalised(x, weight, mean, var, offset, eps)
    if residual is not None:
        y = y + residual.to(dtype)
    return finish(y, x.dtype, relu), mean, var, offset


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
    """(dx, dweight [C], dbias [C], dresidual) of batch_norm; dresidual is empty without a residual.

    mean, var and offset are those that the forward pass returned. With `relu` the mask is taken
    from y, its output, or without y from x and offset (right only where there was no residual).
    """
    dtype = compute_dtype(x)
    wide = grad.to(dtype)
    if relu:
        if y is None:
            if offset is None:
                raise ValueError(
                    "batch_norm_backward: with relu, expected y or offset, got neither; pass one"
                )
            y = _normalised(x, weight, mean, var, offset, eps)
        wide = torch.where(y <= 0, wide.new_zeros(()), wide)
    rstd = (_per_channel(var, x, dtype) + eps).rsqrt()
    normed = (x.to(dtype) - _per_channel(mean, x, dtype)) * rstd
    dims = _all_but_channels(x)
    dbias, dweight = wide.sum(dims), (wide * normed).sum(dims)
    dx = wide
    if training:
        count = max(x.numel() // x.shape[1], 1)
        dx = dx - (_per_channel(dbias, x, dtype) + normed * _per_channel(dweight, x, dtype)) / count
    dx = dx * rstd
    if weight is not None:
        dx = dx * _per_channel(weight, x, dtype)
    dresidual = finish(wide, grad.dtype) if has_residual else grad.new_empty(0)
    return finish(dx, x.dtype), dweight, dbias, dresidual


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.ndim)]
