"""Dense-masked storage: an ordinary dense weight whose gradient exists only where the mask does.

``masked_linear`` (and ``masked_conv2d``, in a file of its own) is torch's dense product with two
differences: the weight's gradient is cleared outside of the mask, in place; and a feature-major
input (which BLAS reads as it is) gives a feature-major output and gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import _C, Tensor
from torch.nn import functional

from sparse_kernels._load import native_or_none
from sparse_kernels.layout import is_feature_major, is_plain, to_feature_major
from sparse_kernels.ops._library import transformed
from sparse_kernels.ops._short import plain
from sparse_kernels.ops.linear import autocast

_grad_enabled = _C.is_grad_enabled
_modes = _C._len_torch_dispatch_stack
_transforms = _C._are_functorch_transforms_active


def native_for(grad: Tensor) -> Any:
    """The native module where it may work on ``grad`` in place, else None."""
    if grad.dtype == torch.float32 and grad.device.type == "cpu" and is_plain(grad):
        return native_or_none()
    return None


def clear_outside(grad: Tensor, mask: Tensor) -> Tensor:
    """A copy of ``grad`` [rows, cols] with zeros outside of ``mask`` (bool, alike)."""
    # On the way of every step of a small layer: no more calls than needed.
    if (
        torch.compiler.is_compiling()
        or _grad_enabled()
        or _modes()
        or not plain(grad)
        or not grad.is_contiguous()
        or not mask.is_contiguous()
        or (native := native_or_none()) is None
    ):
        return grad.masked_fill(~mask, 0)  # not a product: inf * 0 would be NaN
    out = torch.empty_like(grad)
    native.clear_outside(
        out.data_ptr(), grad.data_ptr(), mask.data_ptr(), grad.numel(), torch.get_num_threads()
    )
    return out


def cleared(grad: Tensor, mask: Tensor, own: bool) -> Tensor:
    """``grad`` [rows, cols] with zeros outside of ``mask``; in place if it is the caller's own."""
    native = native_for(grad) if own and grad.is_contiguous() and mask.is_contiguous() else None
    if native is None:
        return clear_outside(grad, mask)
    at = grad.data_ptr()
    native.clear_outside(at, at, mask.data_ptr(), grad.numel(), torch.get_num_threads())
    return grad


def clearing_hook(mask: Tensor) -> Callable[[Tensor], Tensor | None]:
    """A hook for a tensor of ``mask``'s shape that clears its gradient outside of the mask.

    In place where the gradient is float32 in the mask's memory order: only for a tensor that one
    product reads, so that nobody else can hold its gradient.  ``mask`` may be a view; it is read
    when the hook is called.
    """
    native, count = native_or_none(), mask.numel()
    orders = _orders(mask) if native is not None and mask.device.type == "cpu" else ()

    def clear(grad: Tensor) -> Tensor | None:
        # Dispatch keys are not looked at: the gradient is a product's own result.  Those of a
        # batched, traced or user-defined kind show in what is asked here.
        if (
            type(grad) is Tensor
            and grad.dtype is torch.float32
            and not (_grad_enabled() or _modes() or _transforms())
            and grad.stride() in orders
        ):
            at = grad.data_ptr()
            native.clear_outside(at, at, mask.data_ptr(), count, torch.get_num_threads())
            return None
        return None if grad is None else grad.masked_fill(~mask, 0)

    return clear


def _orders(mask: Tensor) -> tuple[tuple[int, ...], ...]:
    """Strides by which a tensor of ``mask``'s shape has the mask's memory order."""
    found = {mask.stride()}
    for name in (torch.contiguous_format, torch.channels_last) if mask.dim() == 4 else ():
        if mask.is_contiguous(memory_format=name):  # a size of 1 may have any stride
            found.add(torch.empty(mask.shape, device="meta", memory_format=name).stride())
    return tuple(found)


def in_dtype_of(x: Tensor, dense: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias for 16-bit activations beside float32 weights: by a cast, as elsewhere."""
    half = x.dtype in (torch.float16, torch.bfloat16) and dense.dtype == torch.float32
    if not half:
        return dense, bias
    return dense.to(x.dtype), None if bias is None else bias.to(x.dtype)


class MaskedWeightFunction(torch.autograd.Function):
    """The dense weight itself; backward masks its gradient and hands the whole one to the probe."""

    generate_vmap_rule = True

    @staticmethod
    def forward(dense: Tensor, mask: Tensor, probe: Tensor | None) -> Tensor:
        return dense.view_as(dense)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        """As backward has it: the weight does not move outside of the mask."""
        (mask,) = ctx.saved_tensors
        return tangent.masked_fill(~mask, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor | None]:
        (mask,) = ctx.saved_tensors
        whole = grads[0] if ctx.needs_input_grad[2] else None
        return cleared(grads[0], mask, own=False), None, whole


def masked_weight(dense: Tensor, mask: Tensor, probe: Tensor | None = None) -> Tensor:
    """``dense`` [rows, cols], differentiated only where ``mask`` is set.

    Entries of ``dense`` outside the mask must be zero; since they get no gradient, every
    elementwise optimizer leaves them so.  ``probe`` [rows, cols] gets the unmasked gradient.

    Raises:
        ValueError: shapes that differ.
    """
    check_shapes(dense, mask, probe)
    return MaskedWeightFunction.apply(dense, mask, probe)


def check_shapes(dense: Tensor, mask: Tensor, probe: Tensor | None) -> None:
    if mask.shape != dense.shape or (probe is not None and probe.shape != dense.shape):
        shapes = [tuple(t.shape) for t in (dense, mask, probe) if t is not None]
        raise ValueError(f"masked_weight: weight, mask and probe must share a shape, got {shapes}")


def transformed_weight(dense: Tensor, mask: Tensor, probe: Tensor | None) -> Tensor | None:
    """``masked_weight`` where a torch.func transform or forward mode is on, else None.

    There torch's own product is called with it: torch knows all its derivatives.
    """
    if not transformed():
        return None
    return masked_weight(dense, mask, probe)


class MaskedLinearFunction(torch.autograd.Function):
    """y = x W^T + b for a masked W; backward clears dW outside of the mask, dx keeps x's layout.

    Arguments of ``apply``: x [N, in], dense [out, in], mask bool [out, in], bias [out] or None,
    probe [out, in] or None (gets the unmasked dW).
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, dense, mask, bias, _ = args
        ctx.save_for_backward(x, dense, mask)
        ctx.feature_major = x.shape[0] > 1 and not x.is_contiguous() and is_feature_major(x)
        # Row-major results even of transposed operands, and then a copy: BLAS is up to 10 times
        # slower where the small batch is the inner dimension of the result.
        y = functional.linear(x, dense, bias)
        return to_feature_major(y) if ctx.feature_major else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, dense, mask = ctx.saved_tensors
        needs, grad = ctx.needs_input_grad, grads[0]
        dx = dw = dp = db = None
        if needs[0]:
            dx = grad @ dense
            dx = to_feature_major(dx) if ctx.feature_major and is_plain(dx) else dx
        if needs[4]:
            dp = grad.t() @ x
            dw = cleared(dp, mask, own=False) if needs[1] else None
        elif needs[1]:
            dw = cleared(grad.t() @ x, mask, own=True)
        if needs[3]:
            db = grad.sum(0)
        return dx, dw, None, db, dp


def masked_linear(
    x: Tensor, dense: Tensor, mask: Tensor, bias: Tensor | None, probe: Tensor | None = None
) -> Tensor:
    """``functional.linear`` with a weight that is differentiated only inside its mask.

    Args:
        x: [..., in]; a feature-major [N, in] gives a feature-major output and gradient.
        dense: [out, in], zero outside of the mask, of x's dtype; mask: bool [out, in].
        bias: [out] or None.
        probe: [out, in] or None; its gradient is the unmasked weight gradient.

    Raises:
        ValueError: shapes that differ.
    """
    check_shapes(dense, mask, probe)
    x = autocast(x, dense)
    dense, bias = in_dtype_of(x, dense, bias)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    weight = transformed_weight(dense, mask, probe)
    if weight is None:
        y = MaskedLinearFunction.apply(flat, dense, mask, bias, probe)
    else:
        y = functional.linear(flat, weight, bias)
    if x.dim() == 2:
        return y
    return y.squeeze(0) if x.dim() == 1 else y.unflatten(0, x.shape[:-1])
