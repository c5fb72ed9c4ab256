"""batch_norm over feature-major activations, with residual addition and ReLU in the same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_kernels.layout import empty_feature_major
from sparse_kernels.ops._library import (
    autograd,
    call,
    check_device,
    define,
    no_double_backward,
    with_check,
)
from sparse_kernels.ops.linear import weight_dtype


def _check_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    eps: float,
    relu: bool,
    residual: Tensor | None,
) -> None:
    if x.dim() not in (2, 4) or not x.is_floating_point():
        raise ValueError(
            "batch_norm: input must be floating point [N, C] or [N, C, H, W], got "
            f"{x.dtype} of shape {tuple(x.shape)}"
        )
    named = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
    for name, tensor in named.items():
        if tensor is not None and tuple(tensor.shape) != (x.shape[1],):
            raise ValueError(
                f"batch_norm: {name} must have shape ({x.shape[1]},), got {tuple(tensor.shape)}"
            )
    if not training and (mean is None or var is None):
        raise ValueError("batch_norm: evaluation needs running_mean and running_var, got None")
    check_device("batch_norm", x, **named, residual=residual)
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"batch_norm: residual must be {x.dtype} of shape {tuple(x.shape)}, got "
            f"{residual.dtype} of shape {tuple(residual.shape)}"
        )


@with_check(_check_forward)
def _fake_forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = empty_feature_major(x.shape, x.dtype, x.device)
    stats = [x.new_empty(x.shape[1], dtype=weight_dtype(x)) for _ in range(3)]
    return y, stats[0], stats[1], stats[2]


def _check_backward(
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
) -> None:
    if grad.shape != x.shape or (y is not None and y.shape != x.shape):
        raise ValueError(
            f"batch_norm_backward: grad and output must have the input's shape {tuple(x.shape)}, "
            f"got {tuple(grad.shape)} and {None if y is None else tuple(y.shape)}"
        )
    if relu and y is None and (has_residual or offset is None):
        raise ValueError(
            "batch_norm_backward: the ReLU's mask needs the output y, or, without a residual, the "
            f"forward pass's offset, got y=None, offset={'None' if offset is None else 'given'}, "
            f"has_residual={has_residual}"
        )
    named = {"weight": weight, "mean": mean, "var": var, "offset": offset}
    check_device("batch_norm_backward", x, grad=grad, y=y, **named)
    for name, tensor in named.items():
        if tensor is not None and tuple(tensor.shape) != (x.shape[1],):
            raise ValueError(
                f"batch_norm_backward: {name} must have shape ({x.shape[1]},), got "
                f"{tuple(tensor.shape)}"
            )


@with_check(_check_backward)
def _fake_backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dx = empty_feature_major(x.shape, x.dtype, x.device)
    stats = [x.new_empty(x.shape[1], dtype=weight_dtype(x)) for _ in range(2)]
    left = empty_feature_major(x.shape, x.dtype, x.device) if rest[-1] else x.new_empty(0)
    return dx, stats[0], stats[1], left


define(
    "batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, bool training,"
    " float eps, bool relu, Tensor? residual) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_forward,
)
define(
    "batch_norm_backward(Tensor grad, Tensor x, Tensor? y, Tensor? weight, Tensor mean, Tensor var,"
    " Tensor? offset, bool training, float eps, bool relu, bool has_residual)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _, _, training, eps, relu, residual = inputs
    y, mean, var, offset = output
    ctx.mark_non_differentiable(mean, var, offset)
    ctx.mode = (training, eps, relu, residual is not None)
    # The ReLU's mask is recomputed from x, so that y need not live until then; a residual is not
    # kept for that, and a 16-bit y may have been rounded to 0.
    needs_y = relu and (residual is not None or x.element_size() < 4)
    ctx.save_for_backward(x, weight, mean, var, offset, y if needs_y else None)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    x, weight, mean, var, offset, y = ctx.saved_tensors
    training, eps, relu, has_residual = ctx.mode
    dx, dweight, dbias, dresidual = call(
        "batch_norm_backward",
        grad,
        x,
        y,
        weight,
        mean,
        var,
        offset,
        training,
        eps,
        relu,
        has_residual,
    )
    needs = ctx.needs_input_grad
    return (
        dx,
        dweight if needs[1] else None,
        dbias if needs[2] else None,
        *([None] * 5),
        dresidual if has_residual else None,
    )


autograd("batch_norm", _backward, _context)
no_double_backward("batch_norm_backward", "batch_norm")


def check_count(op: str, x: Tensor, training: bool) -> None:
    """ValueError if there is one value per channel, whose variance is no statistic."""
    if training and x.dim() > 1 and x.numel() // max(x.shape[1], 1) == 1:
        raise ValueError(
            f"{op}: expected more than 1 value per channel when training, got input size "
            f"{tuple(x.shape)}"
        )


@torch.no_grad()
def track(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float,
    x: Tensor,
) -> None:
    """Move the running statistics, where there are any, towards those of the batch ``x``."""
    count = x.numel() // max(x.shape[1], 1)
    if running_mean is None or running_var is None or count == 0:
        return
    running_mean.lerp_(mean.detach().to(running_mean.dtype), momentum)
    unbiased = var.detach() * (count / (count - 1))
    running_var.lerp_(unbiased.to(running_var.dtype), momentum)


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """Batch normalisation, then ``+ residual`` and ReLU where asked, in one pass over memory.

    Arguments and running statistics are those of torch.nn.functional.batch_norm (biased variance
    normalises, unbiased variance is tracked).  x and residual: [N, C] or [N, C, H, W]; weight,
    bias, running_mean, running_var: [C] or None.  Returns a feature-major tensor of x's shape.

    Raises:
        ValueError: shapes that do not fit, one value per channel while training, or evaluation
            without running statistics.
        plan.BackendError: no backend computes this dtype on this device.
    """
    check_count("batch_norm", x, training)
    batch_stats = training or running_mean is None
    if residual is not None and residual.dtype != x.dtype and residual.is_floating_point():
        # As `norm(x) + residual` promotes under autocast.
        wide = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(wide), residual.to(wide)
    y, mean, var, _ = call(
        "batch_norm",
        x,
        weight,
        bias,
        None if batch_stats else running_mean,
        None if batch_stats else running_var,
        batch_stats,
        eps,
        relu,
        residual,
    )
    if training:
        track(running_mean, running_var, mean, var, momentum, x)
    return y
