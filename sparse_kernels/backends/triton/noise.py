"""Launches the dropout kernel; see ``ops.dropout`` for the meaning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_kernels.backends.triton.kernels import noise as kernels
from sparse_kernels.backends.triton.operands import Launch

#: Counters of a program: 4 numbers each. 8 numbers per thread of 4 warps.
COUNTERS = 256
NUM_WARPS = 4


def dropout(x: Tensor, seed: Tensor, p: float, stride: Sequence[int]) -> Tensor:
    """x * noise with strides ``stride``: 0 with probability p, else 1 / (1 - p)."""
    y = torch.empty_strided(x.shape, stride, dtype=x.dtype, device=x.device)
    x = x.detach()
    if x.stride() != y.stride():
        x = torch.empty_like(y).copy_(x)
    if x.numel():
        launch(y, x, seed, p).run()
    return y


def launch(y: Tensor, x: Tensor, seed: Tensor, p: float) -> Launch:
    """The kernel on y and x, dense in memory and alike in strides."""
    count = x.numel()
    arguments = {
        "y": y,
        "x": x,
        "seed": seed,
        "count": count,
        "least": min(int(p * 2.0**32 + 0.5), 2**32 - 1) - 2**31,
        "scale": 1 / (1 - p) if p < 1 else 0.0,
        "COUNTERS": COUNTERS,
    }
    grid = (-(-count // (4 * COUNTERS)),)
    return Launch(kernels.dropout, grid, arguments, NUM_WARPS, 1)
