"""Batch norm by torch's kernels, ReLU and residual after them; see the package's docstring."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparse_kernels.backends.torch_ops.layouts import exact, of_planes, planes
from sparse_kernels.backends.torch_ops.pooling import max_pool2d, max_pool2d_backward
from sparse_kernels.layout import to_feature_major

_WINDOW = ([2, 2], [2, 2], [0, 0], [1, 1])  # kernel, stride, padding, dilation
_NO_TAP = 255


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
    bias [+ residual]); the offset is the bias.

    x is [N, C] or [N, C, H, W]; training takes mean and biased variance of the batch (NaN if it is
    empty). Statistics and offset are float32.
    """
    wide, channels = planes(x), x.shape[1]
    if training:
        mean, var = _statistics(wide)
    elif mean is None or var is None:
        raise ValueError(
            "batch_norm: expected mean and var outside of training, got None; pass them"
        )
    # Copies, because the outputs of an operator must not alias its inputs.
    mean, var = mean.to(torch.float32, copy=True), var.to(torch.float32, copy=True)
    zeros = torch.zeros(channels, device=x.device)
    offset = zeros if bias is None else bias.to(torch.float32, copy=True)
    y = of_planes(_normalised(wide, weight, mean, var, offset, eps), x.shape)
    if residual is not None:
        y += exact(to_feature_major(residual.detach()))
    return y.relu_() if relu else y, mean, var, offset


def _statistics(wide: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of [1, C, points], summed in float32."""
    if wide.numel() == 0:
        nothing = torch.full((wide.shape[1],), float("nan"), device=wide.device)
        return nothing, nothing
    var, mean = torch.var_mean(wide.to(torch.float32), dim=(0, 2), correction=0)
    return mean, var


def _normalised(
    wide: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, offset: Tensor, eps: float
) -> Tensor:
    """Normalised [1, C, points] in its dtype, by torch's kernel for evaluation."""
    scale = None if weight is None else weight.to(torch.float32)
    if wide.numel() == 0:
        return torch.empty_like(wide)
    if scale is None:
        scale = torch.ones_like(mean)
    y, _, _ = torch.native_batch_norm(wide, scale, offset, mean, var, False, 0.0, eps)
    return y


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
    wide, grads = planes(x), planes(grad)
    mean, var = mean.to(torch.float32), var.to(torch.float32)
    if relu:
        if y is None and offset is None:
            raise ValueError(
                "batch_norm_backward: with relu, expected y or offset, got neither; pass one"
            )
        if y is not None:
            passed = planes(y)
        else:
            assert offset is not None
            passed = _normalised(wide, weight, mean, var, offset.to(torch.float32), eps)
        grads = torch.ops.aten.threshold_backward(grads, passed, 0)
    dresidual = of_planes(grads.clone(), x.shape) if has_residual else grad.new_empty(0)
    dx, dweight, dbias = _backward(grads, wide, weight, mean, var, training, eps)
    return of_planes(dx, x.shape), dweight, dbias, dresidual


def _backward(
    grads: Tensor,
    wide: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if wide.numel() == 0:
        return torch.empty_like(wide), torch.zeros_like(mean), torch.zeros_like(mean)
    scale = torch.ones_like(mean) if weight is None else weight.to(torch.float32)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward(
        grads, wide, scale, mean, var, mean, (var + eps).rsqrt(), training, eps, [True, True, True]
    )
    return found


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

    y and argmax (uint8, 2 * ky + kx, or 255 where y is 0 and no gradient passes) are
    [N, C, H // 2, W // 2]. rounding is 0: the CPU kernels keep there what their mean has lost.
    """
    normed, mean, var, _ = batch_norm(x, weight, bias, mean, var, training, eps, True, None)
    if math.prod(x.shape) == 0:
        shape = (x.shape[0], x.shape[1], x.shape[2] // 2, x.shape[3] // 2)
        empty = exact(normed.new_empty(shape))
        return empty, exact(empty.to(torch.uint8)), mean, var, torch.zeros_like(mean)
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
    dropped = argmax == _NO_TAP
    passing = grad.masked_fill(dropped, 0)
    taps = argmax.masked_fill(dropped, 0)
    wide = max_pool2d_backward(passing, taps, x.shape[2], x.shape[3], *_WINDOW)
    exactly = mean.to(torch.float32) + rounding.to(torch.float32)
    dx, dweight, dbias, _ = batch_norm_backward(
        wide, x, None, weight, exactly, var, None, training, eps, False, False
    )
    return dx, dweight, dbias
