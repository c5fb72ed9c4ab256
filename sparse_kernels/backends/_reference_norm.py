"""Batch norm of the reference backend; see reference.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ._reference_pool import compute_dtype, finish, max_pool2d, max_pool2d_backward


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


_WINDOW = ([2, 2], [2, 2], [0, 0], [1, 1])  # kernel, stride, padding, dilation
_NO_TAP = 255


def batch_norm_pool(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, argmax, mean [C], var [C], rounding [C]): batch_norm with ReLU, then the maximum of 2x2
    pixels, stride 2.

    x is [N, C, H, W]; y and argmax (uint8, 2 * ky + kx, or 255 where y is 0 and no gradient passes)
    are [N, C, H // 2, W // 2]. rounding is 0 here: what the native backend's float mean has lost.
    """
    normed, mean, var, _ = batch_norm(x, weight, bias, mean, var, training, eps, True, None)
    y, argmax = max_pool2d(normed, *_WINDOW, False)
    return y, argmax.masked_fill_(y <= 0, _NO_TAP), mean, var, torch.zeros_like(mean)


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
    """(dx, dweight [C], dbias [C]) of batch_norm_pool, from what its forward pass returned."""
    dtype = compute_dtype(x)
    passing = torch.where(argmax == _NO_TAP, 0, grad.to(dtype))
    taps = argmax.masked_fill(argmax == _NO_TAP, 0)
    wide = max_pool2d_backward(passing, taps, x.shape[2], x.shape[3], *_WINDOW)
    exact = mean.to(dtype) + rounding.to(dtype)
    dx, dweight, dbias, _ = batch_norm_backward(
        wide, x, None, weight, exact, var, None, training, eps, False, False
    )
    return dx, dweight, dbias
