"""conv2d: sparse convolution over shifted pixels, its gradients and the growth signal's.

Shapes: x [N, C_in, H, W], values [capacity, bh, bw] of the matrix [C_out, kh*kw*C_in/groups]
(columns tap-major, channels fastest), y [N, C_out, H_out, W_out].  ``geometry`` holds the 13
integers of ``Conv2dGeometry``.  Like linear's, the products are derivatives of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_kernels import plan
from sparse_kernels.backends import cpu
from sparse_kernels.backends.cpu.prepared import Product, state_of
from sparse_kernels.geometry import Conv2dGeometry
from sparse_kernels.ops import _short
from sparse_kernels.ops._conv2d_checks import (
    check_forward,
    fake_dgrad,
    fake_forward,
    fake_wgrad,
    fake_wgrad_dense,
    geometry_of,
)
from sparse_kernels.ops._convert import convert_once
from sparse_kernels.ops._library import (
    INDEX,
    WEIGHT,
    autograd,
    call,
    call_unseen,
    caller,
    define,
    masked_grad,
    read_elements,
    readable,
    seen,
    transformed,
)
from sparse_kernels.ops.linear import Index, autocast

define(
    f"conv2d(Tensor x, {WEIGHT}, Tensor? bias, Tensor? probe, int[] geometry, bool relu) -> Tensor",
    fake_forward,
    values_at=1,
    probe_at=8,
)
define(
    f"conv2d_dgrad(Tensor grad, {WEIGHT}, SymInt in_height, SymInt in_width, int[] geometry)"
    " -> Tensor",
    fake_dgrad,
    values_at=1,
)
define(
    f"conv2d_wgrad(Tensor grad, Tensor x, {INDEX}, int bh, int bw, int[] geometry) -> Tensor",
    fake_wgrad,
    block_at=7,
)
define("conv2d_wgrad_dense(Tensor grad, Tensor x, int[] geometry) -> Tensor", fake_wgrad_dense)


class SparseConv2dFunction(torch.autograd.Function):
    """Sparse convolution, differentiable in x, values, bias and probe.

    Arguments of ``apply``: x [N, C_in, H, W], values [capacity, bh, bw], crow, col, t_crow, t_row,
    t_perm, bias [C_out] or None, probe [C_out, kh*kw*C_in/groups] or None (never read; its
    gradient is the dense weight gradient), geometry (the integers of ``Conv2dGeometry``), relu.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        # torch inspects the signature of a separate setup_context on every call: 40 us.
        if not args[0].requires_grad:  # else a second derivative must find x itself
            args = (convert_once("conv2d", args[0], args[1]), *args[1:])
        output = call("conv2d", *args)
        SparseConv2dFunction.save(ctx, args, output)
        return output

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what backward needs; also the context of the operator's own derivative."""
        x, values, crow, col, t_crow, t_row, t_perm, _, _, geometry, relu = inputs
        ctx.geometry = list(geometry)
        ctx.save_for_backward(x, values, crow, col, t_crow, t_row, t_perm, output if relu else None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, values, *index, y = ctx.saved_tensors
        grad = grads[0] if y is None else masked_grad(grads[0], y)
        n = ctx.needs_input_grad
        needs = (n[0], n[1], n[7], n[8])
        dx, dv, db, dp = _derivative(grad, x, values, index, needs, ctx.geometry)
        return dx, dv, None, None, None, None, None, db, dp, None, None


def _dgrad_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.geometry = list(inputs[9])
    ctx.save_for_backward(*inputs[:7])


def _dgrad_backward(ctx: Any, ggx: Tensor) -> tuple[Any, ...]:
    grad, values, *index = ctx.saved_tensors
    dgrad = dv = None
    if ctx.needs_input_grad[0]:
        dgrad = call("conv2d", ggx, values, *index, None, None, ctx.geometry, False)
    if ctx.needs_input_grad[1]:
        bh, bw = values.shape[1:]
        dv = call("conv2d_wgrad", grad, ggx, *index, bh, bw, ctx.geometry)
    return (dgrad, dv, *([None] * 8))


def _wgrad_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.geometry = list(inputs[9])
    ctx.save_for_backward(*inputs[:7])


def _wgrad_backward(ctx: Any, ggv: Tensor) -> tuple[Any, ...]:
    grad, x, *index = ctx.saved_tensors
    dgrad = dx = None
    if ctx.needs_input_grad[0]:
        dgrad = call("conv2d", x, ggv, *index, None, None, ctx.geometry, False)
    if ctx.needs_input_grad[1]:
        dx = call("conv2d_dgrad", grad, ggv, *index, x.shape[2], x.shape[3], ctx.geometry)
    return (dgrad, dx, *([None] * 8))


autograd("conv2d", SparseConv2dFunction.backward, SparseConv2dFunction.save)
autograd("conv2d_dgrad", _dgrad_backward, _dgrad_context)
autograd("conv2d_wgrad", _wgrad_backward, _wgrad_context)


def _wgrad_dense_backward(ctx: Any, ggw: Tensor) -> tuple[Any, ...]:
    raise RuntimeError(
        "conv2d_wgrad_dense serves the growth signal and has no second derivative: remove the "
        "probe (layer.probe = None) before a double backward"
    )


autograd("conv2d_wgrad_dense", _wgrad_dense_backward, lambda ctx, inputs, output: None)


def _prepare(x: Tensor, operands: Sequence[Any], geometry: Sequence[int]) -> Product | None:
    values, crow, col, t_crow, t_row, t_perm, bias, probe = operands
    held = (crow, col, t_crow, t_row, t_perm)
    check_forward(x, values, *held, bias, probe, geometry, False)
    if plan.choose("conv2d", x, values) is not cpu or any(t.is_inference() for t in held):
        return None  # inference tensors count no writes
    g = geometry_of("conv2d", geometry)
    out = (g.out_channels, *g.output_size(x.shape[2], x.shape[3]))
    return Product(held, state_of(held), values.shape, tuple(x.shape[1:]), out, geometry, g)


def _derivative(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    index: Index,
    needs: Sequence[bool],
    geometry: Sequence[int],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, values, bias and probe, each by its operator and differentiable again."""
    if needs[0] or needs[1] or needs[3]:
        grad = convert_once("conv2d_dgrad", grad, values)
    product = caller(grad, x, values, *index)
    dx = dv = None
    if needs[0]:
        dx = product("conv2d_dgrad", grad, values, *index, x.shape[2], x.shape[3], geometry)
    dp = product("conv2d_wgrad_dense", grad, x, geometry) if needs[3] else None
    if needs[1] and dp is not None and readable(values):
        dv = read_elements(dp, *index[:2])
    elif needs[1]:
        dv = product("conv2d_wgrad", grad, x, *index, *values.shape[1:], geometry)
    db = grad.sum((0, 2, 3)) if needs[2] else None
    return dx, dv, db, dp


def short_conv2d(x: Tensor, operands: Sequence[Any], geometry: Sequence[int]) -> Tensor | None:
    """``conv2d`` of images x [N, C, H, W] by the short way (ops/_short.py), or None.

    ``operands``: values, the five index tensors, bias and probe.
    """
    if x.dim() != 4:
        return None
    fixed = geometry if type(geometry) is Conv2dGeometry else tuple(geometry)  # not to be written
    return _short.product(x, operands, x.shape[2:], fixed, _prepare, _derivative)


def conv2d(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    t_crow: Tensor,
    t_row: Tensor,
    t_perm: Tensor,
    bias: Tensor | None = None,
    probe: Tensor | None = None,
    *,
    geometry: Sequence[int],
    relu: bool = False,
) -> Tensor:
    """Sparse 2-d convolution (cross-correlation, as torch's), then ReLU if asked.

    Args:
        x: [N, C_in, H, W] or unbatched [C_in, H, W], any strides.
        values: [capacity, bh, bw], the stored blocks in the order of ``col``; tail ignored.
        crow, col, t_crow, t_row, t_perm: a ``SparsityPattern``'s index tensors.
        bias: [C_out] or None.
        probe: [C_out, kh*kw*C_in/groups] or None; never read, its gradient is the dense weight
            gradient (growth signal).
        geometry: the 13 integers of ``Conv2dGeometry``.

    Returns:
        [N, C_out, H_out, W_out] (or unbatched); feature-major, of tensor-core blocks channels_last.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit (both sides are named).
        plan.BackendError: no backend computes this dtype on this device.
    """
    if x.dim() not in (3, 4):
        shape = tuple(x.shape)
        raise ValueError(f"conv2d: input must be [N, C, H, W] or [C, H, W], got shape {shape}")
    x = autocast(x, values, "conv2d")
    batched = x if x.dim() == 4 else x.unsqueeze(0)
    operands = (values, crow, col, t_crow, t_row, t_perm, bias, probe)
    y = None if relu else short_conv2d(batched, operands, geometry)
    rest = (*operands, list(geometry), relu)
    if y is not None:
        pass
    elif transformed():
        y = call("conv2d", batched, *rest)
    elif seen(batched, *rest):
        y = SparseConv2dFunction.apply(batched, *rest)
    else:
        y = call_unseen("conv2d", convert_once("conv2d", batched, values), *rest)
    return y if x.dim() == 4 else y.squeeze(0)
