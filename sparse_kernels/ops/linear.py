"""linear: Y = X S^T, with its two gradients and the dense weight gradient of the growth signal.

Shapes: x [N, in], values [capacity, bh, bw], y [N, out].  The three products are bilinear in two
of (x, values, grad), so each is the derivative of the others and derivatives of any order exist.
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
from sparse_kernels.ops._convert import convert_once
from sparse_kernels.ops._library import (
    INDEX,
    WEIGHT,
    autocast_enabled,
    autograd,
    blocks,
    call,
    call_unseen,
    caller,
    check_activation,
    check_device,
    check_dtypes,
    check_index,
    check_values,
    define,
    empty_result,
    masked_grad,
    read_elements,
    readable,
    seen,
    transformed,
    with_check,
)

Index = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _check_matrix(
    op: str, x: Tensor, block: tuple[int, int], index: Index, out: int, inn: int
) -> None:
    bh, bw = block
    if bh < 1 or bw < 1:
        raise ValueError(f"{op}: both sides of the block must be at least 1, got {block}")
    check_index(op, x, index, blocks(out, 1, bh), blocks(inn, 1, bw), index[1].shape[0])


def _check_forward(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    t_crow: Tensor,
    t_row: Tensor,
    t_perm: Tensor,
    bias: Tensor | None,
    probe: Tensor | None,
    out_features: int,
    relu: bool,
) -> None:
    check_activation("linear", "input", x, 2)
    check_values("linear", x, values)
    if (bias is not None and bias.device != x.device) or probe is not None:
        check_device("linear", x, bias=bias, probe=probe)
    if values.shape[0] != col.shape[0]:
        raise ValueError(
            f"linear: values and col must have one capacity, got {values.shape[0]} and "
            f"{col.shape[0]}"
        )
    block = (values.shape[1], values.shape[2])
    _check_matrix("linear", x, block, (crow, col, t_crow, t_row, t_perm), out_features, x.shape[1])
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"linear: bias must have shape ({out_features},), got {tuple(bias.shape)}")
    if probe is not None and tuple(probe.shape) != (out_features, x.shape[1]):
        raise ValueError(
            f"linear: probe must have the weight's shape ({out_features}, {x.shape[1]}), "
            f"got {tuple(probe.shape)}"
        )


@with_check(_check_forward)
def _fake_forward(x: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return empty_result("linear", (x.shape[0], rest[-2]), x, values)


def _check_dgrad(
    grad: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    t_crow: Tensor,
    t_row: Tensor,
    t_perm: Tensor,
    in_features: int,
) -> None:
    check_activation("linear_dgrad", "grad", grad, 2)
    check_values("linear_dgrad", grad, values)
    block = (values.shape[1], values.shape[2])
    index = (crow, col, t_crow, t_row, t_perm)
    _check_matrix("linear_dgrad", grad, block, index, grad.shape[1], in_features)


@with_check(_check_dgrad)
def _fake_dgrad(grad: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return empty_result("linear_dgrad", (grad.shape[0], rest[-1]), grad, values)


def _check_pair(op: str, grad: Tensor, x: Tensor, dims: int) -> None:
    check_activation(op, "grad", grad, dims)
    check_activation(op, "input", x, dims)
    if grad.shape[0] != x.shape[0]:
        raise ValueError(
            f"{op}: grad and input must have one batch size, got {grad.shape[0]} and {x.shape[0]}"
        )
    check_dtypes(op, grad, x)
    if grad.device != x.device:
        check_device(op, x, grad=grad)


def _check_wgrad(
    grad: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    t_crow: Tensor,
    t_row: Tensor,
    t_perm: Tensor,
    bh: int,
    bw: int,
) -> None:
    _check_pair("linear_wgrad", grad, x, 2)
    index = (crow, col, t_crow, t_row, t_perm)
    _check_matrix("linear_wgrad", grad, (bh, bw), index, grad.shape[1], x.shape[1])


def weight_dtype(x: Tensor) -> torch.dtype:
    """Dtype in which gradients of values are written: float32 for 16-bit activations."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


@with_check(_check_wgrad)
def _fake_wgrad(grad: Tensor, x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((rest[1].shape[0], rest[-2], rest[-1]), dtype=weight_dtype(x))


def _fake_wgrad_dense(grad: Tensor, x: Tensor) -> Tensor:
    _check_pair("linear_wgrad_dense", grad, x, 2)
    return x.new_empty((grad.shape[1], x.shape[1]), dtype=weight_dtype(x))


define(
    f"linear(Tensor x, {WEIGHT}, Tensor? bias, Tensor? probe, SymInt out_features, bool relu)"
    " -> Tensor",
    _fake_forward,
    values_at=1,
    probe_at=8,
)
define(f"linear_dgrad(Tensor grad, {WEIGHT}, SymInt in_features) -> Tensor", _fake_dgrad, 1)
define(
    f"linear_wgrad(Tensor grad, Tensor x, {INDEX}, int bh, int bw) -> Tensor",
    _fake_wgrad,
    block_at=7,
)
define("linear_wgrad_dense(Tensor grad, Tensor x) -> Tensor", _fake_wgrad_dense)


class SparseLinearFunction(torch.autograd.Function):
    """Y = X S^T (+ bias, ReLU) with S compressed, differentiable in x, values, bias and probe.

    Arguments of ``apply``: x [N, in], values [capacity, bh, bw], crow, col, t_crow, t_row, t_perm
    (one ``SparsityPattern``'s tensors), bias [out] or None, probe [out, in] or None (never read;
    its gradient is the dense weight gradient), out_features, relu.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        # torch inspects the signature of a separate setup_context on every call: 40 us.
        if not args[0].requires_grad:  # else a second derivative must find x itself
            args = (convert_once("linear", args[0], args[1]), *args[1:])
        output = call("linear", *args)
        SparseLinearFunction.save(ctx, args, output)
        return output

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what backward needs; also the context of the operator's own derivative."""
        x, values, crow, col, t_crow, t_row, t_perm, _, _, _, relu = inputs
        ctx.relu = relu
        ctx.save_for_backward(x, values, crow, col, t_crow, t_row, t_perm, output if relu else None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, values, *index, y = ctx.saved_tensors
        grad = grads[0] if y is None else masked_grad(grads[0], y)
        n = ctx.needs_input_grad
        dx, dv, db, dp = _derivative(grad, x, values, index, (n[0], n[1], n[7], n[8]))
        return dx, dv, None, None, None, None, None, db, dp, None, None


def _dgrad_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])


def _dgrad_backward(ctx: Any, ggx: Tensor) -> tuple[Any, ...]:
    grad, values, *index = ctx.saved_tensors
    dgrad = dv = None
    if ctx.needs_input_grad[0]:
        dgrad = call("linear", ggx, values, *index, None, None, grad.shape[1], False)
    if ctx.needs_input_grad[1]:
        dv = call("linear_wgrad", grad, ggx, *index, values.shape[1], values.shape[2])
    return dgrad, dv, None, None, None, None, None, None


def _wgrad_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])


def _wgrad_backward(ctx: Any, ggv: Tensor) -> tuple[Any, ...]:
    grad, x, *index = ctx.saved_tensors
    dgrad = dx = None
    if ctx.needs_input_grad[0]:
        dgrad = call("linear", x, ggv, *index, None, None, grad.shape[1], False)
    if ctx.needs_input_grad[1]:
        dx = call("linear_dgrad", grad, ggv, *index, x.shape[1])
    return dgrad, dx, None, None, None, None, None, None, None


def _wgrad_dense_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _wgrad_dense_backward(ctx: Any, ggw: Tensor) -> tuple[Any, ...]:
    grad, x = ctx.saved_tensors
    return x @ ggw.t(), grad @ ggw


autograd("linear", SparseLinearFunction.backward, SparseLinearFunction.save)
autograd("linear_dgrad", _dgrad_backward, _dgrad_context)
autograd("linear_wgrad", _wgrad_backward, _wgrad_context)
autograd("linear_wgrad_dense", _wgrad_dense_backward, _wgrad_dense_context)


_CAST = (torch.float32, torch.float16, torch.bfloat16)


def autocast(x: Tensor, values: Tensor | None = None, op: str | None = None) -> Tensor:
    """``x`` in the dtype that an enabled autocast wants for products, as nn.Linear casts its input.

    float64 stays, as in torch.  Float32 ``values`` are not cast here: a backend may multiply them
    as they are (the CPU does, in float32) or in the activation's dtype, and their gradient is
    float32.  16-bit ``values`` decide themselves.  Where no backend serves ``op`` in that dtype,
    the product stays in float32.
    """
    if not autocast_enabled(x) or x.dtype not in _CAST:
        return x
    wanted = torch.get_autocast_dtype(x.device.type)
    if values is not None and values.dtype in _CAST[1:]:
        wanted = values.dtype
    elif (
        op is not None and not torch.compiler.is_compiling() and not _served(op, x, values, wanted)
    ):
        wanted = torch.float32
    return x if x.dtype == wanted else x.to(wanted)


def _served(op: str, x: Tensor, values: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether a backend computes ``op`` on activations like ``x`` in ``dtype``."""
    try:
        plan.choose(op, x.new_empty(0, dtype=dtype), values)
    except plan.BackendError:
        return False
    return True


def _prepare(x: Tensor, operands: Sequence[Any], out_features: int) -> Product | None:
    values, crow, col, t_crow, t_row, t_perm, bias, probe = operands
    held = (crow, col, t_crow, t_row, t_perm)
    _check_forward(x, values, *held, bias, probe, out_features, False)
    if plan.choose("linear", x, values) is not cpu or any(t.is_inference() for t in held):
        return None  # inference tensors count no writes
    inn = x.shape[1]
    one_pixel = Conv2dGeometry(out_features, inn, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1)
    state = state_of(held)
    return Product(held, state, values.shape, (inn,), (out_features,), out_features, one_pixel)


def _derivative(
    grad: Tensor, x: Tensor, values: Tensor, index: Index, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, values, bias and probe, each by its operator and differentiable again."""
    if needs[0] or needs[1] or needs[3]:
        grad = convert_once("linear_dgrad", grad, values)
    product = caller(grad, x, values, *index)
    dx = product("linear_dgrad", grad, values, *index, x.shape[1]) if needs[0] else None
    dp = product("linear_wgrad_dense", grad, x) if needs[3] else None
    dv = None
    if needs[1] and dp is not None and readable(values):
        dv = read_elements(dp, *index[:2])
    elif needs[1]:
        dv = product("linear_wgrad", grad, x, *index, values.shape[1], values.shape[2])
    db = grad.sum(0) if needs[2] else None
    return dx, dv, db, dp


def short_linear(x: Tensor, operands: Sequence[Any], out_features: int) -> Tensor | None:
    """``linear`` of a matrix x [N, in] by the short way (ops/_short.py), or None.

    ``operands``: values, the five index tensors, bias and probe.
    """
    if x.dim() != 2:
        return None
    return _short.product(x, operands, None, out_features, _prepare, _derivative)


def linear(
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
    out_features: int,
    relu: bool = False,
) -> Tensor:
    """Sparse linear layer: y = x S^T + bias, then ReLU if asked.

    Args:
        x: [..., in_features], any strides.
        values: [capacity, bh, bw], the stored blocks in the order of ``col``; tail ignored.
        crow, col, t_crow, t_row, t_perm: a ``SparsityPattern``'s index tensors.
        bias: [out_features] or None.
        probe: [out_features, in_features] or None; never read, its gradient is the dense weight
            gradient (growth signal).

    Returns:
        [..., out_features]; feature-major (batch innermost), of tensor-core blocks batch-major.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit (both sides are named).
        plan.BackendError: no backend computes this dtype on this device.
    """
    if x.dim() == 0:
        raise ValueError("linear: input must have at least 1 dimension, got a scalar")
    x = autocast(x, values, "linear")
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    operands = (values, crow, col, t_crow, t_row, t_perm, bias, probe)
    y = None if relu else short_linear(flat, operands, out_features)
    rest = (*operands, out_features, relu)
    if y is not None:
        pass
    elif transformed():
        y = call("linear", flat, *rest)
    elif seen(flat, *rest):
        y = SparseLinearFunction.apply(flat, *rest)
    else:
        y = call_unseen("linear", convert_once("linear", flat, values), *rest)
    if x.dim() == 2:
        return y
    return y.squeeze(0) if x.dim() == 1 else y.unflatten(0, x.shape[:-1])
