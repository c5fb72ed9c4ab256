"""The one table of operators: schema, shape check and fake kernel of each are registered here.

The real kernel of every operator is the same three lines: check, let ``plan`` choose a backend,
call the backend's function of the operator's name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from sparse_kernels import plan
from sparse_kernels.layout import empty_feature_major, holds_its_numbers
from sparse_kernels.ops import _transforms

NAMESPACE = "sparse_kernels"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

#: Their names begin so; these also work under torch.func.
_PRODUCTS = ("linear", "conv2d")

#: Names of all registered operators, in the order of their definition.
OPERATORS: list[str] = []

#: How the sparse weight appears in every schema.
WEIGHT = "Tensor values, Tensor crow, Tensor col, Tensor t_crow, Tensor t_row, Tensor t_perm"
INDEX = "Tensor crow, Tensor col, Tensor t_crow, Tensor t_row, Tensor t_perm"


#: The real kernel of each operator, and the kernel recorded by autograd.
_KERNELS: dict[str, Callable[..., Any]] = {}
_RECORDED: dict[str, Callable[..., Any]] = {}


def define(
    schema: str,
    fake: Callable[..., Any],
    values_at: int | None = None,
    probe_at: int | None = None,
    block_at: int | None = None,
) -> None:
    """Define an operator from its schema and its fake kernel.

    ``fake`` checks shapes, dtypes and devices (raising ValueError or TypeError with both sides)
    and returns empty outputs; it runs before the real kernel too, on metadata only, so that no
    native pointer is ever taken from tensors that do not fit.  ``values_at`` is the position of
    the compressed values, whose dtype and block decide about the backend with those of the first
    argument; of a weight gradient ``block_at`` is the position of the block's two sides.
    Schemas carry no defaults: torch strips defaulted arguments from Python kernels.
    """
    name = schema.partition("(")[0]
    check = getattr(fake, "check", fake)

    def kernel(*args: Any) -> Any:
        check(*args)
        values = None if values_at is None else args[values_at]
        block = None if block_at is None else (args[block_at], args[block_at + 1])
        if probe_at is not None:
            args = args[:probe_at] + args[probe_at + 1 :]
        compute = getattr(plan.choose(name, args[0], values, block), name)
        if not autocast_enabled(args[0]):
            return compute(*args)
        # The dtype was settled before the operator; torch's own calls inside must keep it.
        with torch.autocast(args[0].device.type, enabled=False):
            return compute(*args)

    _KERNELS[name] = kernel
    LIBRARY.define(schema)
    LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    OPERATORS.append(name)


def empty_result(op: str, shape: Sequence[int], x: Tensor, values: Tensor) -> Tensor:
    """Uninitialised result of ``shape``, with the strides that the backend will give it."""
    if not plan.batch_major(op, x, values):
        return empty_feature_major(shape, x.dtype, x.device)
    form = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(tuple(shape), dtype=x.dtype, device=x.device, memory_format=form)


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
    """Register the derivative of an operator, for the dispatcher and for ``call``."""
    if name.startswith(_PRODUCTS):
        _transforms.register(name, backward, setup_context)
    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=LIBRARY
    )

    def forward(ctx: Any, *args: Any) -> Any:
        # torch inspects the signature of a separate setup_context on every call: 40 us.
        output = _compute(name, *args)
        setup_context(ctx, args, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    recorded = type(f"{NAMESPACE}_{name}", (torch.autograd.Function,), methods)
    # Function.apply without what it does for torch.func, which ``seen`` has excluded: 5 us.
    _RECORDED[name] = super(torch.autograd.Function, recorded).apply  # type: ignore[misc]


def call(name: str, *args: Any) -> Any:
    """Operator ``name`` on ``args``, by the shortest way on which everyone who looks still sees it.

    The dispatcher takes about 45 us to reach a kernel written in Python and to come back, more than
    a small layer computes.  Where nobody looks, this calls the kernel itself, or the operator's
    derivative around it where autograd records.  Whoever looks (``seen``) gets the operator.
    """
    if not seen(*args):
        return call_unseen(name, *args)
    if name.startswith(_PRODUCTS) and transformed():
        return _transforms.apply(name, *args)
    return getattr(torch.ops.sparse_kernels, name)(*args)


def call_unseen(name: str, *args: Any) -> Any:
    """``call`` where ``seen`` is known to be False."""
    if torch.is_grad_enabled() and _C._any_requires_grad(*args):
        return _RECORDED[name](*args)
    return _compute(name, *args)


def caller(*tensors: Tensor) -> Callable[..., Any]:
    """``call`` or ``call_unseen`` for several operators on these tensors and on those made of them.

    It looks once instead of at every operator.
    """
    return call if seen(*tensors) else call_unseen


def _compute(name: str, *args: Any) -> Any:
    if not torch.autograd._profiler_enabled():
        return _KERNELS[name](*args)
    with torch.profiler.record_function(f"{NAMESPACE}::{name}"):
        return _KERNELS[name](*args)


def seen(*args: Any) -> bool:
    """Whether somebody between this call and the kernel must see the operator or its tensors.

    That is: torch.compile, export and jit tracing, modes (TorchDispatchMode with fake tensors,
    functionalisation and FLOP counters; TorchFunctionMode), torch.func transforms, forward-mode
    derivatives, and tensors that only the dispatcher can resolve (``holds_its_numbers``).
    """
    if (
        torch.compiler.is_compiling()
        or _C._len_torch_dispatch_stack()
        or _C._len_torch_function_stack()
        or _C._are_functorch_transforms_active()
        or _C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return True
    for arg in args:  # a plain loop: this runs at every operator call
        kind = type(arg)
        if kind is Tensor or kind is Parameter:
            # What only the dispatcher can resolve comes from floating-point operators: not indices.
            if arg.dtype is not torch.int32 and not holds_its_numbers(arg):
                return True
        elif isinstance(arg, Tensor):
            return True
    return False


def transformed() -> bool:
    """Whether a layer's product must be called in the form that torch.func understands."""
    return _transforms.active() and not torch.compiler.is_compiling()


def autocast_enabled(x: Tensor) -> bool:
    """Whether an autocast is on for the device of ``x``."""
    if not _C._is_any_autocast_enabled():  # nearly always, and quickly asked
        return False
    kind = x.device.type  # some know no autocast: meta, for one
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


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


def readable(values: Tensor) -> bool:
    """Whether a dense weight gradient that is there anyway also gives that of ``values``.

    Not while a second derivative is recorded: the sampled product has one, the dense one has not.
    """
    return values.shape[1] == values.shape[2] == 1 and not torch.is_grad_enabled()


def read_elements(dense: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    """``dense`` [rows, cols] at the stored elements: [capacity, 1, 1] with a zero tail.

    Shapes depend on the capacity only, never on the pattern: traceable, no host synchronisation.
    """
    (rows, cols), capacity = dense.shape, col.shape[0]
    # Each slot's row: how many rows have ended before it. (searchsorted takes 9 times as long.)
    ends = crow.new_zeros(capacity + 1).index_add(0, crow[1:-1], crow.new_ones(1).expand(rows - 1))
    places = ends[:-1].cumsum(0) * cols + col  # int64
    stored = torch.arange(capacity, device=col.device, dtype=crow.dtype) < crow[-1]
    # What the tail of col holds is nobody's business: read somewhere, then zero.
    read = dense.reshape(-1).index_select(0, torch.where(stored, places, 0))
    return torch.where(stored, read, 0).view(capacity, 1, 1)
