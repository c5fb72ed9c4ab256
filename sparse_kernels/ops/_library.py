"""The one table of operators: schema, shape check and fake kernel of each are registered here.

The real kernel of every operator is the same three lines: check, let ``plan`` choose a backend,
call the backend's function of the operator's name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparse_kernels import plan

NAMESPACE = "sparse_kernels"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

#: Names of all registered operators, in the order of their definition.
OPERATORS: list[str] = []

#: How the sparse weight appears in every schema.
WEIGHT = "Tensor values, Tensor crow, Tensor col, Tensor t_crow, Tensor t_row, Tensor t_perm"
INDEX = "Tensor crow, Tensor col, Tensor t_crow, Tensor t_row, Tensor t_perm"


def define(
    schema: str,
    fake: Callable[..., Any],
    values_at: int | None = None,
    probe_at: int | None = None,
) -> None:
    """Define an operator from its schema and its fake kernel.

    ``fake`` checks shapes, dtypes and devices (raising ValueError or TypeError with both sides)
    and returns empty outputs; it runs before the real kernel too, on metadata only, so that no
    native pointer is ever taken from tensors that do not fit.  ``values_at`` is the position of
    the compressed values, whose dtype and block decide about the backend with those of the first
    argument.  Schemas carry no defaults: torch strips defaulted arguments from Python kernels.
    """
    name = schema.partition("(")[0]
    check = getattr(fake, "check", fake)

    def kernel(*args: Any) -> Any:
        check(*args)
        values = None if values_at is None else args[values_at]
        if probe_at is not None:
            args = args[:probe_at] + args[probe_at + 1 :]
        compute = getattr(plan.choose(name, args[0], values), name)
        kind = args[0].device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return compute(*args)
        # The dtype was settled before the operator; torch's own calls inside must keep it.
        with torch.autocast(kind, enabled=False):
            return compute(*args)

    LIBRARY.define(schema)
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    OPERATORS.append(name)


def with_check(check: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Attach the shape check of an operator to its fake kernel (see ``define``)."""

    def attach(fake: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any) -> Any:
            check(*args)
            return fake(*args)

        checked.check = check  # type: ignore[attr-defined]
        return checked

    return attach


def autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Register the derivative of an operator."""
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=LIBRARY
    )


def no_double_backward(name: str, forward: str) -> None:
    """Make differentiating the backward operator ``name`` an error instead of a silent zero."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{forward} has no second derivative: sparse_kernels::{name} was differentiated. "
            f"Use torch.nn.functional.{forward} where a double backward is needed"
        )

    autograd(name, backward, lambda ctx, inputs, output: None)


def check_activation(op: str, name: str, x: Tensor, dims: int) -> None:
    """``x`` must be a real floating tensor of ``dims`` dimensions."""
    if x.dim() != dims:
        raise ValueError(
            f"{op}: {name} must have {dims} dimensions, got {x.dim()} with shape {tuple(x.shape)}"
        )
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {x.dtype}; convert it first")


def check_dtypes(op: str, x: Tensor, values: Tensor) -> None:
    """Activations have the values' dtype, or are 16-bit beside float32 values."""
    half = x.dtype in (torch.float16, torch.bfloat16) and values.dtype == torch.float32
    if x.dtype != values.dtype and not half:
        raise TypeError(
            f"{op}: the activation's dtype must equal that of values, got {x.dtype} and "
            f"{values.dtype}; convert one of them, e.g. x.to({values.dtype})"
        )


def check_index(
    op: str,
    x: Tensor,
    index: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    block_rows: int,
    block_cols: int,
    capacity: int,
) -> None:
    """The five index tensors fit the block grid; their contents are ``SparsityPattern``'s care."""
    crow, col, t_crow, t_row, t_perm = index
    int32, device = torch.int32, x.device
    # One expression on the way of every operator; what is wrong is found out only if something is.
    if (
        crow.dtype == col.dtype == t_crow.dtype == t_row.dtype == t_perm.dtype == int32
        and crow.shape == (block_rows + 1,)
        and t_crow.shape == (block_cols + 1,)
        and col.shape == t_row.shape == t_perm.shape == (capacity,)
        and crow.device == col.device == t_crow.device == t_row.device == t_perm.device == device
        and crow.is_contiguous()
        and col.is_contiguous()
        and t_crow.is_contiguous()
        and t_row.is_contiguous()
        and t_perm.is_contiguous()
    ):
        return
    expected = (block_rows + 1, capacity, block_cols + 1, capacity, capacity)
    names = ("crow", "col", "t_crow", "t_row", "t_perm")
    for name, tensor, length in zip(names, index, expected, strict=True):
        if tensor.dtype != torch.int32 or tensor.dim() != 1 or tensor.shape[0] != length:
            raise ValueError(
                f"{op}: {name} must be int32 of shape ({length},) for a block grid of "
                f"{block_rows} x {block_cols} and capacity {capacity}, got {tensor.dtype} of "
                f"shape {tuple(tensor.shape)}; take the tensors from one SparsityPattern"
            )
        if tensor.device != x.device or not tensor.is_contiguous():
            raise ValueError(
                f"{op}: {name} must be contiguous on {x.device}, got strides {tensor.stride()} "
                f"on {tensor.device}"
            )


def check_values(op: str, x: Tensor, values: Tensor) -> None:
    """Values are [capacity, bh, bw] beside the activation."""
    if values.dim() != 3:
        raise ValueError(
            f"{op}: values must have shape [capacity, bh, bw], got {tuple(values.shape)}"
        )
    if values.device != x.device:
        raise ValueError(
            f"{op}: input and values must share a device, got {x.device} and {values.device}; "
            "move one of them with .to()"
        )
    check_dtypes(op, x, values)


def check_device(op: str, x: Tensor, **others: Tensor | None) -> None:
    """Every other tensor lies on ``x``'s device: native code would read a foreign pointer."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"{op}: {name} must be on the input's device {x.device}, got {tensor.device}; "
                "move one of them with .to()"
            )


def masked_grad(grad: Tensor, y: Tensor) -> Tensor:
    """Gradient through a fused ReLU, as torch's own: NaN outputs pass it on, inf * 0 is 0."""
    return torch.ops.aten.threshold_backward(grad, y, 0)


def blocks(length: int, parts: int, side: int) -> int:
    """Number of blocks of ``side`` along ``length`` split in ``parts`` segments."""
    return parts * -(-(length // parts) // side)
