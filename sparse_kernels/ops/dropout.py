"""dropout with a mask that is a function of a seed, so that the backward pass draws it again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_kernels.layout import is_feature_major
from sparse_kernels.ops._library import autograd, call, check_device, define, with_check


def _check(x: Tensor, seed: Tensor, p: float, stride: Sequence[int]) -> None:
    if not x.is_floating_point():
        raise TypeError(f"dropout: input must be floating point, got {x.dtype}; convert it first")
    if seed.dtype != torch.int64 or seed.dim() != 0:
        raise ValueError(
            f"dropout: seed must be one int64 number of shape (), got {seed.dtype} of shape "
            f"{tuple(seed.shape)}"
        )
    if not 0 <= p <= 1:
        raise ValueError(f"dropout: p must be between 0 and 1, got {p}")
    check_device("dropout", x, seed=seed)
    if len(stride) != x.dim() or not _is_dense(x.shape, stride):
        raise ValueError(
            f"dropout: stride must order the elements of shape {tuple(x.shape)} in memory without "
            f"gaps, got {tuple(stride)}; pass dense_strides(x)"
        )


def _is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether a tensor fills its memory, each place once; sizes not yet known are taken to fit."""
    if any(type(number) is not int for number in (*shape, *stride)) or math.prod(shape) == 0:
        return True
    expected = 1
    for step, size in sorted((s, n) for s, n in zip(stride, shape, strict=True) if n != 1):
        if step != expected:
            return False
        expected *= size
    return True


@with_check(_check)
def _fake(x: Tensor, seed: Tensor, p: float, stride: Sequence[int]) -> Tensor:
    return torch.empty_strided(x.shape, stride, dtype=x.dtype, device=x.device)


define("dropout(Tensor x, Tensor seed, float p, SymInt[] stride) -> Tensor", _fake)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, ctx.p, ctx.stride = inputs
    ctx.save_for_backward(seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    # Linear in x, with a diagonal matrix: the operator is its own derivative, of any order.
    (seed,) = ctx.saved_tensors
    return call("dropout", grad, seed, ctx.p, ctx.stride), None, None, None


autograd("dropout", _backward, _context)


def dense_strides(x: Tensor) -> tuple[int, ...]:
    """Strides without gaps or overlap in the order of ``x``'s own: those, if they are such."""
    if x.is_contiguous() or is_feature_major(x):
        return x.stride()
    return torch.empty_like(x, device="meta").stride()


def dropout(
    x: Tensor, p: float = 0.5, training: bool = True, *, seed: Tensor | None = None
) -> Tensor:
    """Zero each element of ``x`` with probability ``p``, multiply the others by 1 / (1 - p).

    x: floating point, any shape and strides; the result has its layout.  As in
    torch.nn.functional.dropout dropped elements are multiplied by 0 (NaN stays NaN), and ``x``
    itself is returned where ``training`` is False or ``p`` is 0.  The random numbers differ from
    torch's: element i in memory order has word i of the counter-based generator Philox4x32-7
    (Salmon et al., SC'11, order in csrc/cpu/dropout.cpp) for ``seed``, so neither the number of
    threads nor the instruction set matters.  The backward pass draws the mask again; nothing else
    is kept.

    Args:
        seed: int64 of shape (); by default drawn from torch's default generator of ``x``'s device,
            once per call, so that torch.manual_seed makes it reproducible.

    Raises:
        TypeError, ValueError: an input that is not floating point, p outside of [0, 1].
        plan.BackendError: no backend computes this dtype on this device.
    """
    if (not training or p == 0) and x.is_floating_point():
        return x
    if seed is None:
        seed = torch.randint(2**63 - 1, (), device=x.device)
    return call("dropout", x, seed, float(p), dense_strides(x))
