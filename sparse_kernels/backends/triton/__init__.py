"""The Triton backend: block patterns (both sides 16 to 128) on the tensor cores of a GPU.

Layout: batch-major ([N, F] contiguous) for linear, channels_last for conv2d; other strides are
converted on the way in. Triton is an optional dependency: nothing here imports it until an operator
is called. With TRITON_INTERPRET=1 in the environment the kernels run on CPU tensors, for tests.

float32 products follow torch.backends: linear the flag of cuda.matmul, conv2d that of cudnn.
bfloat16 and float16 accumulate in float32; gradients of values are float32 in every case. Results
do not depend on the schedule of the GPU: no atomics, every sum in a fixed order.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparse_kernels.backends.triton.block_config import ProductConfig, WgradConfig

__all__ = [
    "conv2d",
    "conv2d_dgrad",
    "conv2d_wgrad",
    "linear",
    "linear_dgrad",
    "linear_wgrad",
    "supports",
]

_SERVED = ("linear", "linear_dgrad", "linear_wgrad", "conv2d", "conv2d_dgrad", "conv2d_wgrad")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_SIDE, MAX_SIDE = 16, 128


def interpreting() -> bool:
    """Whether the environment asks Triton to interpret its kernels, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def installed() -> bool:
    """Whether a Triton with the kernel language can be imported (a mere folder is none)."""
    try:
        return importlib.util.find_spec("triton.language") is not None
    except ModuleNotFoundError:
        return False


def supports(op: str, x: Tensor, values: Tensor | None = None) -> str | None:
    """None if this backend computes ``op`` on tensors like these, else the reason why not.

    Weight gradients come without values: their block is checked when they are called.
    """
    if x.device.type != "cuda" and not (x.device.type == "cpu" and interpreting()):
        return f"serves CUDA tensors (or the CPU's with TRITON_INTERPRET=1), got {x.device}"
    if not installed():
        return "triton is not installed (pip install 'sparse_kernels[triton]', Linux only)"
    if op not in _SERVED:
        return f"has kernels for {', '.join(_SERVED)} only"
    if x.dtype not in _DTYPES:
        return f"computes float32, bfloat16 and float16, got {x.dtype}"
    if values is not None and values.dtype not in _DTYPES:
        return f"takes float32 values, got {values.dtype}"
    if values is not None:
        return unsupported_block(values.shape[1], values.shape[2])
    return None


def unsupported_block(bh: int, bw: int) -> str | None:
    """None if blocks of bh x bw are served, else the reason why not."""
    if MIN_SIDE <= bh <= MAX_SIDE and MIN_SIDE <= bw <= MAX_SIDE:
        return None
    return f"serves blocks with both sides in {MIN_SIDE} to {MAX_SIDE}, got {(bh, bw)}"


def linear(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    t_crow: Tensor,
    t_row: Tensor,
    t_perm: Tensor,
    bias: Tensor | None,
    out_features: int,
    relu: bool,
    *,
    config: ProductConfig | None = None,
) -> Tensor:
    """y [N, out] = x [N, in] S^T + bias, rectified if ``relu``; batch-major, in x's dtype."""
    from sparse_kernels.backends.triton import block_products

    index = (crow, col, t_crow, t_row, t_perm)
    return block_products.linear(x, values, index, bias, out_features, relu, config)


def linear_dgrad(
    grad: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    t_crow: Tensor,
    t_row: Tensor,
    t_perm: Tensor,
    in_features: int,
    *,
    config: ProductConfig | None = None,
) -> Tensor:
    """dx [N, in] = grad [N, out] S; batch-major, in grad's dtype."""
    from sparse_kernels.backends.triton import block_products

    index = (crow, col, t_crow, t_row, t_perm)
    return block_products.linear_dgrad(grad, values, index, in_features, config)


def linear_wgrad(
    grad: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    t_crow: Tensor,
    t_row: Tensor,
    t_perm: Tensor,
    bh: int,
    bw: int,
    *,
    config: WgradConfig | None = None,
) -> Tensor:
    """dvalues float32 [capacity, bh, bw] = grad^T x at the pattern; zero tail, zero outside."""
    from sparse_kernels.backends.triton import block_wgrad

    return block_wgrad.linear_wgrad(grad, x, crow, col, bh, bw, config)


def conv2d(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    t_crow: Tensor,
    t_row: Tensor,
    t_perm: Tensor,
    bias: Tensor | None,
    geometry: Sequence[int],
    relu: bool,
    *,
    config: ProductConfig | None = None,
) -> Tensor:
    """y [N, C_out, H', W'] of x [N, C_in, H, W] (+ bias, ReLU); channels_last, in x's dtype."""
    from sparse_kernels.backends.triton import block_products

    index = (crow, col, t_crow, t_row, t_perm)
    return block_products.conv2d(x, values, index, bias, geometry, relu, config)


def conv2d_dgrad(
    grad: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    t_crow: Tensor,
    t_row: Tensor,
    t_perm: Tensor,
    in_height: int,
    in_width: int,
    geometry: Sequence[int],
    *,
    config: ProductConfig | None = None,
) -> Tensor:
    """dx [N, C_in, in_height, in_width] of grad [N, C_out, H', W']; channels_last."""
    from sparse_kernels.backends.triton import block_products

    index = (crow, col, t_crow, t_row, t_perm)
    size = (in_height, in_width)
    return block_products.conv2d_dgrad(grad, values, index, size, geometry, config)


def conv2d_wgrad(
    grad: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    t_crow: Tensor,
    t_row: Tensor,
    t_perm: Tensor,
    bh: int,
    bw: int,
    geometry: Sequence[int],
    *,
    config: WgradConfig | None = None,
) -> Tensor:
    """dvalues float32 [capacity, bh, bw] of the convolution; zero tail, zero outside."""
    from sparse_kernels.backends.triton import block_wgrad

    return block_wgrad.conv2d_wgrad(grad, x, crow, col, bh, bw, geometry, config)
