"""Dropout over memory in any order: a mask from a counter-based generator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_kernels._load import native
from sparse_kernels.backends.cpu.convert import result
from sparse_kernels.backends.cpu.memory import empty_strided


def dropout(x: Tensor, seed: Tensor, p: float, stride: Sequence[int]) -> Tensor:
    """x * noise(seed, place) with the places of a tensor of strides ``stride``, the result's."""
    count = x.numel()
    xs = x
    if x.dtype != torch.float32 or not _lies(x, stride):
        xs = empty_strided(x.shape, stride, count).copy_(x)
    y = empty_strided(x.shape, stride, count)
    native().dropout(y.data_ptr(), xs.data_ptr(), count, int(seed), p, torch.get_num_threads())
    return result(y, x.dtype)


def _lies(x: Tensor, stride: Sequence[int]) -> bool:
    """Whether ``x`` has these strides, those of dimensions of size 1 aside."""
    return all(n == 1 or a == b for n, a, b in zip(x.shape, x.stride(), stride, strict=True))
