"""Batch norm, ReLU and 2x2 max pooling in one pass over feature-major activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_kernels.layout import empty_feature_major
from sparse_kernels.ops._library import (
    autograd,
    call,
    check_activation,
    check_device,
    define,
    no_double_backward,
    with_check,
)
from sparse_kernels.ops.linear import weight_dtype
from sparse_kernels.ops.norm import check_count, track


def _check_vectors(op: str, x: Tensor, **named: Tensor | None) -> None:
    check_device(op, x, **named)
    for name, tensor in named.items():
        if tensor is not None and tuple(tensor.shape) != (x.shape[1],):
            raise ValueError(
                f"{op}: {name} must have shape ({x.shape[1]},), got {tuple(tensor.shape)}"
            )


def _pooled(x: Tensor) -> tuple[int, int, int, int]:
    return x.shape[0], x.shape[1], x.shape[2] // 2, x.shape[3] // 2


def _check_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    eps: float,
) -> None:
    check_activation("batch_norm_pool", "input", x, 4)
    if min(x.shape[2:]) < 2:
        raise ValueError(
            f"batch_norm_pool: an image of {x.shape[2]} x {x.shape[3]} pixels is smaller than the "
            "window [2, 2]"
        )
    named = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
    _check_vectors("batch_norm_pool", x, **named)
    if not training and (mean is None or var is None):
        raise ValueError("batch_norm_pool: evaluation needs running_mean and running_var, got None")


@with_check(_check_forward)
def _fake_forward(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    y = empty_feature_major(_pooled(x), x.dtype, x.device)
    argmax = empty_feature_major(_pooled(x), torch.uint8, x.device)
    stats = [x.new_empty(x.shape[1], dtype=weight_dtype(x)) for _ in range(3)]
    return y, argmax, *stats


def _check_backward(
    grad: Tensor,
    argmax: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    rounding: Tensor,
    training: bool,
    eps: float,
) -> None:
    op = "batch_norm_pool_backward"
    check_activation(op, "input", x, 4)
    shape = _pooled(x)
    if grad.shape != shape or argmax.shape != shape or argmax.dtype != torch.uint8:
        raise ValueError(
            f"{op}: grad and argmax (uint8) must have shape {shape} for an input of "
            f"{tuple(x.shape)}, got {tuple(grad.shape)} and {argmax.dtype} of "
            f"{tuple(argmax.shape)}"
        )
    check_device(op, x, grad=grad, argmax=argmax)
    _check_vectors(op, x, weight=weight, mean=mean, var=var, rounding=rounding)


@with_check(_check_backward)
def _fake_backward(grad: Tensor, argmax: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dx = empty_feature_major(x.shape, x.dtype, x.device)
    stats = [x.new_empty(x.shape[1], dtype=weight_dtype(x)) for _ in range(2)]
    return dx, *stats


define(
    "batch_norm_pool(Tensor x, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var,"
    " bool training, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_forward,
)
define(
    "batch_norm_pool_backward(Tensor grad, Tensor argmax, Tensor x, Tensor? weight, Tensor mean,"
    " Tensor var, Tensor rounding, bool training, float eps) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _, _, training, eps = inputs
    _, argmax, mean, var, rounding = output
    ctx.mark_non_differentiable(argmax, mean, var, rounding)
    ctx.mode = (training, eps)
    ctx.save_for_backward(argmax, x, weight, mean, var, rounding)


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    dx, dweight, dbias = call("batch_norm_pool_backward", grad, *ctx.saved_tensors, *ctx.mode)
    needs = ctx.needs_input_grad
    return dx, dweight if needs[1] else None, dbias if needs[2] else None, *([None] * 4)


autograd("batch_norm_pool", _backward, _context)
no_double_backward("batch_norm_pool_backward", "batch_norm_pool")


def batch_norm_pool(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """max_pool2d(relu(batch_norm(x)), 2) in one pass: the normalised image is never written.

    x is [N, C, H, W] with H, W >= 2; the other arguments are those of ``batch_norm``.  Returns a
    feature-major tensor [N, C, H // 2, W // 2].

    Raises:
        ValueError: shapes that do not fit, one value per channel while training, or evaluation
            without running statistics.
        plan.BackendError: no backend computes this dtype on this device.
    """
    check_count("batch_norm_pool", x, training)
    batch_stats = training or running_mean is None
    y, _, mean, var, _ = call(
        "batch_norm_pool",
        x,
        weight,
        bias,
        None if batch_stats else running_mean,
        None if batch_stats else running_var,
        batch_stats,
        eps,
    )
    if training:
        track(running_mean, running_var, mean, var, momentum, x)
    return y
