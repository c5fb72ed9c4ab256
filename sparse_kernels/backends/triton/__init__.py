"""The Triton backend: element, V x 1 and block patterns on a GPU, and dropout.

Blocks with both sides in 16 to 128 are multiplied by the tensor cores, in batch-major ([N, F]
contiguous) or channels_last layout (``block_*``); elements and V x 1 blocks up to V = 32 in
feature-major layout (``vector_*``). Other strides are converted on the way in. Triton is an
optional dependency: nothing here imports it until an operator is called. With TRITON_INTERPRET=1
in the environment the kernels run on CPU tensors, for tests.

float32 products follow torch.backends: linear the flag of cuda.matmul, conv2d that of cudnn.
bfloat16 and float16 accumulate in float32; gradients of values are float32 in every case. Results
do not depend on the schedule of the GPU: no atomics, every sum in a fixed order.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_kernels.backends.triton import chosen

if TYPE_CHECKING:
    from sparse_kernels.backends.triton.block_config import ProductConfig, WgradConfig
    from sparse_kernels.backends.triton.vector_config import VectorConfig, VectorWgradConfig

__all__ = [
    "conv2d",
    "conv2d_dgrad",
    "conv2d_wgrad",
    "dropout",
    "linear",
    "linear_dgrad",
    "linear_wgrad",
    "supports",
]

_PRODUCTS = ("linear", "linear_dgrad", "linear_wgrad", "conv2d", "conv2d_dgrad", "conv2d_wgrad")
_SERVED = (*_PRODUCTS, "dropout")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_SIDE, MAX_SIDE = 16, 128
MAX_VECTOR = 32


def interpreting() -> bool:
    """Whether the environment asks Triton to interpret its kernels, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def installed() -> bool:
    """Whether a Triton with the kernel language can be imported (a mere folder is none)."""
    try:
        return importlib.util.find_spec("triton.language") is not None
    except ModuleNotFoundError:
        return False


def supports(
    op: str, x: Tensor, values: Tensor | None = None, block: tuple[int, int] | None = None
) -> str | None:
    """None if this backend computes ``op`` on tensors like these, else the reason why not.

    ``block`` tells that of a weight gradient, which has no values yet.
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
        block = (values.shape[1], values.shape[2])
    return None if block is None else unsupported_block(*block)


def writes_batch_major(block: tuple[int, int]) -> bool:
    """Whether results for this block are batch-major or channels_last, not feature-major."""
    return on_tensor_cores(*block)


def unsupported_block(bh: int, bw: int) -> str | None:
    """None if blocks of bh x bw are served, else the reason why not."""
    if on_tensor_cores(bh, bw) or is_vector(bh, bw):
        return None
    return (
        f"serves blocks with both sides in {MIN_SIDE} to {MAX_SIDE} and (V, 1) with V up to "
        f"{MAX_VECTOR}, got {(bh, bw)}"
    )


def on_tensor_cores(bh: int, bw: int) -> bool:
    """Whether the kernels for blocks serve bh x bw: batch-major and channels_last."""
    return MIN_SIDE <= bh <= MAX_SIDE and MIN_SIDE <= bw <= MAX_SIDE


def is_vector(bh: int, bw: int) -> bool:
    """Whether the kernels for elements and V x 1 blocks serve bh x bw: feature-major."""
    return bw == 1 and 1 <= bh <= MAX_VECTOR


def _products(bh: int, bw: int) -> ModuleType:
    """The module whose kernels compute products with blocks of bh x bw."""
    if is_vector(bh, bw):
        from sparse_kernels.backends.triton import vector_products

        return vector_products
    from sparse_kernels.backends.triton import block_products

    return block_products


def _wgrad(
    op: str, grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, block: tuple[int, int], *rest: Any
) -> Tensor:
    """Weight gradient ``op`` by the module that serves the block."""
    if is_vector(*block):
        from sparse_kernels.backends.triton import vector_wgrad

        found: Tensor = getattr(vector_wgrad, op)(grad, x, crow, col, block[0], *rest)
        return found
    from sparse_kernels.backends.triton import block_wgrad

    found = getattr(block_wgrad, op)(grad, x, crow, col, *block, *rest)
    return found


def _linear_config(
    op: str, first: Tensor, stored: Sequence[int], out_features: int, in_features: int
) -> Any | None:
    """What ``tune`` chose for a linear product, if anything."""
    return _config(op, first, stored, (1, 1), (out_features, in_features, 1, 1))


def _config(
    op: str, first: Tensor, stored: Sequence[int], image: Sequence[int], geometry: Sequence[int]
) -> Any | None:
    """What ``tune`` chose for a product, if anything. ``stored``: the shape of the values."""
    capacity, bh, bw = stored
    return chosen.lookup(op, first.dtype, (bh, bw), first.shape[0], image, geometry, capacity)


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
    config: ProductConfig | VectorConfig | None = None,
) -> Tensor:
    """y [N, out] = x [N, in] S^T + bias, rectified if ``relu``; in x's dtype."""
    index = (crow, col, t_crow, t_row, t_perm)
    config = config or _linear_config("linear", x, values.shape, out_features, x.shape[1])
    return _products(*values.shape[1:]).linear(x, values, index, bias, out_features, relu, config)


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
    config: ProductConfig | VectorConfig | None = None,
) -> Tensor:
    """dx [N, in] = grad [N, out] S; in grad's dtype."""
    index = (crow, col, t_crow, t_row, t_perm)
    config = config or _linear_config(
        "linear_dgrad", grad, values.shape, grad.shape[1], in_features
    )
    return _products(*values.shape[1:]).linear_dgrad(grad, values, index, in_features, config)


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
    config: WgradConfig | VectorWgradConfig | None = None,
) -> Tensor:
    """dvalues float32 [capacity, bh, bw] = grad^T x at the pattern; zero tail, zero outside."""
    stored = (col.shape[0], bh, bw)
    config = config or _linear_config("linear_wgrad", grad, stored, grad.shape[1], x.shape[1])
    return _wgrad("linear_wgrad", grad, x, crow, col, (bh, bw), config)


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
    config: ProductConfig | VectorConfig | None = None,
) -> Tensor:
    """y [N, C_out, H', W'] of x [N, C_in, H, W] (+ bias, ReLU), in x's dtype."""
    index = (crow, col, t_crow, t_row, t_perm)
    config = config or _config("conv2d", x, values.shape, x.shape[2:], geometry)
    return _products(*values.shape[1:]).conv2d(x, values, index, bias, geometry, relu, config)


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
    config: ProductConfig | VectorConfig | None = None,
) -> Tensor:
    """dx [N, C_in, in_height, in_width] of grad [N, C_out, H', W']."""
    index = (crow, col, t_crow, t_row, t_perm)
    size = (in_height, in_width)
    config = config or _config("conv2d_dgrad", grad, values.shape, size, geometry)
    return _products(*values.shape[1:]).conv2d_dgrad(grad, values, index, size, geometry, config)


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
    config: WgradConfig | VectorWgradConfig | None = None,
) -> Tensor:
    """dvalues float32 [capacity, bh, bw] of the convolution; zero tail, zero outside."""
    stored = (col.shape[0], bh, bw)
    config = config or _config("conv2d_wgrad", grad, stored, x.shape[2:], geometry)
    return _wgrad("conv2d_wgrad", grad, x, crow, col, (bh, bw), geometry, config)


def dropout(x: Tensor, seed: Tensor, p: float, stride: Sequence[int]) -> Tensor:
    """x * noise(seed, place in memory) with strides ``stride``; the mask is every backend's."""
    from sparse_kernels.backends.triton import noise

    return noise.dropout(x, seed, p, stride)
