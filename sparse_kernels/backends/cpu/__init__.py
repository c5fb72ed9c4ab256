"""The native CPU backend: allocates, converts layouts and calls one launcher per operator.

Activations are feature-major float32 inside (see ``layout``).  Any strides and the 16-bit dtypes
are accepted: they are converted on the way in, and the result is rounded once on the way out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_kernels._load import native_or_none
from sparse_kernels.backends.cpu.dropout import dropout
from sparse_kernels.backends.cpu.norm import (
    batch_norm,
    batch_norm_backward,
    batch_norm_pool,
    batch_norm_pool_backward,
)
from sparse_kernels.backends.cpu.pooling import (
    avg_pool2d,
    avg_pool2d_backward,
    max_pool2d,
    max_pool2d_backward,
)
from sparse_kernels.backends.cpu.products import (
    conv2d,
    conv2d_dgrad,
    conv2d_wgrad,
    linear,
    linear_dgrad,
    linear_wgrad,
)
from sparse_kernels.backends.cpu.wgrad_dense import conv2d_wgrad_dense, linear_wgrad_dense

__all__ = [
    "avg_pool2d",
    "avg_pool2d_backward",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_pool",
    "batch_norm_pool_backward",
    "conv2d",
    "conv2d_dgrad",
    "conv2d_wgrad",
    "conv2d_wgrad_dense",
    "dropout",
    "linear",
    "linear_dgrad",
    "linear_wgrad",
    "linear_wgrad_dense",
    "max_pool2d",
    "max_pool2d_backward",
    "supports",
]

_COMPUTED = (torch.float32, torch.bfloat16, torch.float16)


def supports(
    op: str, x: Tensor, values: Tensor | None, block: tuple[int, int] | None = None
) -> str | None:
    """None if this backend computes ``op`` on tensors like these, else the reason why not."""
    if x.device.type != "cpu":
        return f"serves CPU tensors, got device {x.device}"
    if x.dtype not in _COMPUTED:
        return f"computes float32 (and 16-bit activations through it), got {x.dtype}"
    if values is not None and values.dtype not in _COMPUTED:
        return f"takes float32 values, got {values.dtype}"
    if native_or_none() is None:
        return "the native module is not built (pip install . , or `make native` in a checkout)"
    return None
