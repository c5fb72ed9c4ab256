"""The short way through a small layer: one prepared native call forward, one backward.

The operators of ``linear`` and ``conv2d`` check, look up and convert at every call what changes
once in some hundred steps, and each costs a call from Python; for LeNet-sized layers that was most
of a step.  Where nobody looks at operators and tensors are plain float32 on the CPU, a layer goes
this way; everywhere else, and for derivatives of derivatives, the operators are called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import _profiler_enabled, forward_ad
from torch.nn import Parameter

from sparse_kernels import plan
from sparse_kernels.backends import cpu
from sparse_kernels.backends.cpu import prepared
from sparse_kernels.layout import CPU_KEYS, is_feature_major, to_feature_major
from sparse_kernels.ops._library import read_elements, readable

_is_compiling = torch.compiler.is_compiling
_keys = _C._dispatch_keys
_modes = _C._len_torch_dispatch_stack
_functions = _C._len_torch_function_stack
_transforms = _C._are_functorch_transforms_active
_tracing = _C._get_tracing_state
_autocast = _C._is_any_autocast_enabled
_FLOAT = torch.float32


def _watched() -> bool:
    """Whether somebody must see operators (see ``_library.seen``) or chose how they compute."""
    return bool(
        _is_compiling()
        or _modes()
        or _functions()
        or _transforms()
        or _autocast()
        or _profiler_enabled()
        or plan.forced()
        or _tracing() is not None
        or forward_ad._current_level >= 0
    )


def plain(tensor: Tensor) -> bool:
    """Whether a pointer to ``tensor`` says all about it: plain float32 on the CPU."""
    kind = type(tensor)
    return (
        (kind is Tensor or kind is Parameter)
        and tensor.dtype is _FLOAT
        and _keys(tensor).raw_repr() in CPU_KEYS
    )


class _ShortFunction(torch.autograd.Function):
    """Both layers' product; ``apply(x, values, bias, probe, index, product, derivative)``.

    ``derivative`` computes the gradients by operators, where this way does not serve.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, values, bias, _, index, product, derivative = args
        image = x if is_feature_major(x) else to_feature_major(x)
        # A second derivative must find x itself.
        ctx.save_for_backward(x if x.requires_grad else image, values)
        ctx.index, ctx.product, ctx.derivative = index, product, derivative
        return product.forward(image, values, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, values = ctx.saved_tensors
        (grad,) = grads
        needs, product = ctx.needs_input_grad, ctx.product
        if prepared.state_of(ctx.index) != product.state:
            raise RuntimeError(_written(ctx.index, product.state))
        if values.shape != product.values_shape or values.dtype is not _FLOAT:
            # ``values.data = ...`` is no write that torch counts; the kernel reads by address.
            raise RuntimeError(
                f"the layer's values were replaced between forward and backward: expected "
                f"{list(product.values_shape)} in float32, got {list(values.shape)} in "
                f"{values.dtype}; change a layer only after backward()"
            )
        if (
            _C.is_grad_enabled()
            or _modes()
            or _transforms()
            or _profiler_enabled()
            or forward_ad._current_level >= 0
            or not plain(grad)
        ):
            more = () if len(product.in_shape) == 1 else (list(product.geometry),)
            found = ctx.derivative(grad, x, values, ctx.index, needs, *more)
            return (*found, None, None, None)
        if not is_feature_major(grad):
            grad = to_feature_major(grad)
        image = x if is_feature_major(x) else to_feature_major(x)
        dp = _dense_gradient(grad, x, product) if needs[3] else None
        read = None
        if needs[1] and dp is not None and readable(values):
            read = read_elements(dp, *ctx.index[:2])
        wanted = (needs[0], needs[1] and read is None, needs[2])
        dx, dv, db = product.backward(grad, image, values, wanted)
        dv = dv if read is None else read
        return dx, dv, db, dp, None, None, None


# Function.apply without what it does for torch.func, which ``_watched`` has excluded: 5 us.
_apply = super(torch.autograd.Function, _ShortFunction).apply


def _dense_gradient(grad: Tensor, x: Tensor, product: prepared.Product) -> Tensor:
    if len(product.in_shape) == 1:
        return cpu.linear_wgrad_dense(grad, x)
    return cpu.conv2d_wgrad_dense(grad, x, product.geometry)


def _written(index: prepared.Index, state: prepared.State) -> str:
    names = ("crow", "col", "t_crow", "t_row", "t_perm")
    now = prepared.state_of(index)
    changed = [name for i, name in enumerate(names) if now[i::5] != state[i::5]]
    return (
        "one of the variables needed for gradient computation has been modified by an inplace "
        f"operation: the pattern's {' and '.join(changed)} changed between forward and backward; "
        "change a pattern (set_pattern_, a mask update) only after backward()"
    )


def product(
    x: Tensor,
    operands: Sequence[Any],
    size: Any,
    geometry: Any,
    make: Callable[[Tensor, Sequence[Any], Any], prepared.Product | None],
    derivative: Callable[..., tuple[Any, ...]],
) -> Tensor | None:
    """The layer's output, or None where only the operator itself will do.

    Args:
        x: [N, ...features]; operands: values, five index tensors, bias, probe.
        size: what beside index tensors and geometry a prepared product depends on (hashable).
        geometry: what the product must have been made for.
        make: prepares the product of (x, operands, geometry) after all checks; raises what the
            operator raises; None where the operator must compute it.
        derivative: see ``_ShortFunction``.
    """
    values, crow, col, t_crow, t_row, t_perm, bias, probe = operands
    if _watched() or not (plain(x) and plain(values) and values.is_contiguous()):
        return None
    if bias is not None and not (plain(bias) and bias.is_contiguous()):
        return None
    index = (crow, col, t_crow, t_row, t_perm)
    found = prepared.find(index, size)
    if found is None or (found.geometry is not geometry and found.geometry != geometry):
        found = make(x, operands, geometry)
        if found is None:
            return None
        prepared.keep(index, size, found)
    if (
        x.shape[1:] != found.in_shape
        or values.shape != found.values_shape
        or (bias is not None and bias.shape != found.out_shape[:1])
    ):
        return None  # the operator says what is wrong
    if _C.is_grad_enabled():
        if probe is None or (plain(probe) and probe.shape == found.matrix_shape):
            return _apply(x, values, bias, probe, index, found, derivative)
        return None
    image = x if is_feature_major(x) else to_feature_major(x)
    return found.forward(image, values, bias)
