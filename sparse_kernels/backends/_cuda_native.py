"""What the modules of the CUDA backend share: the native module, and how a launcher is told of
tensors, devices and streams. The tests put the emulated module here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_kernels._load import native, native_or_none
from sparse_kernels.layout import is_feature_major, to_feature_major

__all__ = ["ELEMENTS", "activation", "as_float", "native", "native_or_none", "place", "pointer"]

#: In the order of csrc/kernels_cuda.h's Element.
ELEMENTS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def place(x: Tensor) -> tuple[int, int]:
    """Ordinal of x's device and its current stream."""
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def activation(x: Tensor) -> Tensor:
    """x itself where it is feature-major, else a feature-major copy."""
    return x if is_feature_major(x) else to_feature_major(x.detach())


def as_float(x: Tensor) -> Tensor:
    """Weights and biases: contiguous float32."""
    return x.detach().to(torch.float32).contiguous()


def pointer(x: Tensor | None) -> int:
    """Address of the first element; 0 for None."""
    return 0 if x is None else x.data_ptr()
