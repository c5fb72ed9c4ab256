"""max_pool2d and avg_pool2d over feature-major activations, with torch's arguments and meaning."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_kernels.geometry import pool_output_size
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

Pair = Sequence[int]


def _output(
    op: str, x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil: bool
) -> tuple[int, int, int, int]:
    check_activation(op, "input", x, 4)
    named = {"kernel_size": kernel, "stride": stride, "dilation": dilation}
    for name, pair in named.items():
        if len(pair) != 2 or min(pair) < 1:
            raise ValueError(f"{op}: {name} must be two integers of at least 1, got {list(pair)}")
    if len(padding) != 2 or any(not 0 <= p <= k // 2 for p, k in zip(padding, kernel, strict=True)):
        raise ValueError(
            f"{op}: padding must be between 0 and half the kernel {list(kernel)}, got "
            f"{list(padding)}"
        )
    out = pool_output_size(x.shape[2:], kernel, stride, padding, dilation, ceil)
    if min(out) < 1:
        raise ValueError(
            f"{op}: an image of {x.shape[2]} x {x.shape[3]} pixels is smaller than the window "
            f"{list(kernel)}"
        )
    return x.shape[0], x.shape[1], out[0], out[1]


def _check_max(
    x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool
) -> tuple[int, int, int, int]:
    if kernel[0] * kernel[1] > 255:
        raise ValueError(
            f"max_pool2d: a window may have at most 255 taps, got {list(kernel)}; use "
            "torch.nn.functional.max_pool2d"
        )
    return _output("max_pool2d", x, kernel, stride, padding, dilation, ceil_mode)


@with_check(_check_max)
def _fake_max(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = _check_max(x, *rest)
    return (
        empty_feature_major(shape, x.dtype, x.device),
        empty_feature_major(shape, torch.uint8, x.device),
    )


def _check_max_backward(
    grad: Tensor,
    argmax: Tensor,
    in_height: int,
    in_width: int,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> None:
    check_activation("max_pool2d_backward", "grad", grad, 4)
    check_device("max_pool2d_backward", grad, argmax=argmax)
    if argmax.dtype != torch.uint8 or argmax.shape != grad.shape:
        raise ValueError(
            f"max_pool2d_backward: argmax must be uint8 of shape {tuple(grad.shape)}, got "
            f"{argmax.dtype} of shape {tuple(argmax.shape)}"
        )


@with_check(_check_max_backward)
def _fake_max_backward(grad: Tensor, argmax: Tensor, *rest: Any) -> Tensor:
    shape = (grad.shape[0], grad.shape[1], rest[0], rest[1])
    return empty_feature_major(shape, grad.dtype, grad.device)


def _check_avg(
    x: Tensor,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> tuple[int, int, int, int]:
    if divisor_override == 0:
        raise ValueError("avg_pool2d: divisor_override must not be 0")
    return _output("avg_pool2d", x, kernel, stride, padding, (1, 1), ceil_mode)


@with_check(_check_avg)
def _fake_avg(x: Tensor, *rest: Any) -> Tensor:
    return empty_feature_major(_check_avg(x, *rest), x.dtype, x.device)


def _fake_avg_backward(grad: Tensor, in_height: int, in_width: int, *rest: Any) -> Tensor:
    check_activation("avg_pool2d_backward", "grad", grad, 4)
    shape = (grad.shape[0], grad.shape[1], in_height, in_width)
    return empty_feature_major(shape, grad.dtype, grad.device)


_WINDOW = "int[] kernel, int[] stride, int[] padding"
_IMAGE = "SymInt in_height, SymInt in_width"
_AVERAGE = "bool ceil_mode, bool count_include_pad, int? divisor_override"
define(
    f"max_pool2d(Tensor x, {_WINDOW}, int[] dilation, bool ceil_mode) -> (Tensor, Tensor)",
    _fake_max,
)
define(
    f"max_pool2d_backward(Tensor grad, Tensor argmax, {_IMAGE}, {_WINDOW}, int[] dilation)"
    " -> Tensor",
    _fake_max_backward,
)
define(f"avg_pool2d(Tensor x, {_WINDOW}, {_AVERAGE}) -> Tensor", _fake_avg)
define(
    f"avg_pool2d_backward(Tensor grad, {_IMAGE}, {_WINDOW}, {_AVERAGE}) -> Tensor",
    _fake_avg_backward,
)


def _max_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, kernel, stride, padding, dilation, _ = inputs
    ctx.window = (kernel, stride, padding, dilation)
    ctx.image = (x.shape[2], x.shape[3])
    ctx.save_for_backward(output[1])


def _max_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Any, ...]:
    (argmax,) = ctx.saved_tensors
    dx = call("max_pool2d_backward", grad, argmax, *ctx.image, *ctx.window)
    return dx, None, None, None, None, None


def _avg_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.window = inputs[1:]
    ctx.image = (inputs[0].shape[2], inputs[0].shape[3])


def _avg_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (call("avg_pool2d_backward", grad, *ctx.image, *ctx.window), *([None] * 6))


autograd("max_pool2d", _max_backward, _max_context)
autograd("avg_pool2d", _avg_backward, _avg_context)
no_double_backward("max_pool2d_backward", "max_pool2d")
no_double_backward("avg_pool2d_backward", "avg_pool2d")


def _pair(value: Any) -> list[int]:
    """One or two integers (numpy's too, or a sequence of one) as two, as torch takes them."""
    sides = [operator.index(v) for v in value] if isinstance(value, Sequence) else []
    sides = sides or [operator.index(value)]
    return sides * 2 if len(sides) == 1 else sides


def _stride(stride: Any, kernel: list[int]) -> list[int]:
    """Torch's default stride is the kernel; an empty sequence means the default."""
    absent = stride is None or (isinstance(stride, Sequence) and len(stride) == 0)
    return kernel if absent else _pair(stride)


def _batched(op: str, x: Tensor) -> Tensor:
    if x.dim() not in (3, 4):
        raise ValueError(f"{op}: input must be [N, C, H, W] or [C, H, W], got {tuple(x.shape)}")
    return x if x.dim() == 4 else x.unsqueeze(0)


def max_pool2d(
    x: Tensor,
    kernel_size: int | Pair,
    stride: int | Pair | None = None,
    padding: int | Pair = 0,
    dilation: int | Pair = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Maximum over windows of x [N, C, H, W] (or unbatched); arguments as in torch.nn.functional.

    Returns a feature-major tensor.  A window may have at most 255 taps.

    Raises:
        ValueError: arguments that do not fit the image.
    """
    kernel = _pair(kernel_size)
    y = call(
        "max_pool2d",
        _batched("max_pool2d", x),
        kernel,
        _stride(stride, kernel),
        _pair(padding),
        _pair(dilation),
        ceil_mode,
    )[0]
    return y if x.dim() == 4 else y.squeeze(0)


def avg_pool2d(
    x: Tensor,
    kernel_size: int | Pair,
    stride: int | Pair | None = None,
    padding: int | Pair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Mean over windows of x [N, C, H, W] (or unbatched); arguments as in torch.nn.functional.

    Returns a feature-major tensor.

    Raises:
        ValueError: arguments that do not fit the image.
    """
    kernel = _pair(kernel_size)
    y = call(
        "avg_pool2d",
        _batched("avg_pool2d", x),
        kernel,
        _stride(stride, kernel),
        _pair(padding),
        ceil_mode,
        count_include_pad,
        divisor_override,
    )
    return y if x.dim() == 4 else y.squeeze(0)
