"""Backend `torch`: the operators that are dense by nature, by torch's own kernels of the device.

Batch norm, pooling, and the dense weight gradients of the growth window, on CUDA tensors: there is
no weight here to leave out, and cuBLAS and cuDNN compute the dense gradient as well as anyone. No
product with a sparse weight is computed here; `plan` gives those to `triton` and `cuda`. Results
are feature-major, as the operators promise: in torch's eyes feature-major images are the transposed
channels_last ones, so its kernels read and write them as they lie. float32, bfloat16 and float16;
statistics and weight gradients are float32.

CPU tensors are served only where SPARSE_KERNELS_BACKEND or ``plan.use_backend`` names this backend,
for tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_kernels.backends.torch_ops.norm import (
    batch_norm,
    batch_norm_backward,
    batch_norm_pool,
    batch_norm_pool_backward,
)
from sparse_kernels.backends.torch_ops.pooling import (
    avg_pool2d,
    avg_pool2d_backward,
    max_pool2d,
    max_pool2d_backward,
)
from sparse_kernels.backends.torch_ops.wgrad_dense import conv2d_wgrad_dense, linear_wgrad_dense

__all__ = [
    "avg_pool2d",
    "avg_pool2d_backward",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_pool",
    "batch_norm_pool_backward",
    "conv2d_wgrad_dense",
    "linear_wgrad_dense",
    "max_pool2d",
    "max_pool2d_backward",
    "supports",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(
    op: str, x: Tensor, values: Tensor | None = None, block: tuple[int, int] | None = None
) -> str | None:
    """None if this backend computes ``op`` on tensors like these, else the reason why not."""
    if x.device.type not in ("cuda", "cpu"):
        return f"serves CUDA tensors, got {x.device}"
    if x.dtype not in _DTYPES:
        return f"computes float32, bfloat16 and float16, got {x.dtype}"
    return None
