"""What every native launcher needs: float32, the right layout, a pointer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_kernels.backends.cpu.memory import empty_strided
from sparse_kernels.layout import feature_major_strides, is_feature_major, to_feature_major


def activation(x: Tensor) -> Tensor:
    """``x`` as feature-major float32: itself where it already is."""
    if x.dtype != torch.float32:
        x = x.detach().to(torch.float32)
    return x if is_feature_major(x) else to_feature_major(x)


def dense(x: Tensor) -> Tensor:
    """``x`` as contiguous float32, for weights and per-channel vectors."""
    if x.dtype == torch.float32 and x.is_contiguous():
        return x  # the usual case costs no dispatcher call
    return x.detach().to(torch.float32).contiguous()


def result(y: Tensor, dtype: torch.dtype) -> Tensor:
    """The float32 result in the dtype that the caller computes in."""
    return y if dtype == torch.float32 else y.to(dtype)


def pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def optional(x: Tensor | None) -> Tensor | None:
    return None if x is None else dense(x)


def empty_float(shape: Sequence[int], like: Tensor) -> Tensor:
    """Uninitialised feature-major float32 tensor of ``shape`` on the device of ``like``."""
    strides = feature_major_strides(tuple(shape))
    return empty_strided(shape, strides, math.prod(shape))


def empty_matrix(batch: int, features: int, like: Tensor) -> Tensor:
    """``empty_float((batch, features), like)`` for a float32 ``like``, in a single call of torch.

    torch.empty_strided with dtype and device takes a third longer.
    """
    return like.new_empty_strided((batch, features), (1, max(batch, 1)))


def empty_values(capacity: int, bh: int, bw: int, like: Tensor) -> Tensor:
    """Uninitialised [capacity, bh, bw] as a float32 ``like``, contiguous."""
    return like.new_empty_strided((capacity, bh, bw), (max(bh * bw, 1), max(bw, 1), 1))
