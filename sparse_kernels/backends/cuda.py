"""The CUDA backend: the native kernels compiled by nvcc, for GPU tensors.

Serves elements and vectors, blocks (V, 1) with V up to 32, batch norm and pooling, in float32,
float16 and bfloat16, with float32 sums; what it does not serve, ``supports`` says. Activations are
feature-major; weights are read, and their gradients written, in float32. Blocks of 16 x 16 and
32 x 32 go to the tensor cores (_cuda_blocks.py), in batch-major or channels_last layout. Work is
queued on the current stream of the tensors' device. RuntimeError with CUDA's message where a launch
fails.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_kernels.backends import _cuda_blocks, _cuda_native, _cuda_variants
from sparse_kernels.backends._cuda_dense import (
    avg_pool2d,
    avg_pool2d_backward,
    batch_norm,
    batch_norm_backward,
    batch_norm_pool,
    batch_norm_pool_backward,
    max_pool2d,
    max_pool2d_backward,
)
from sparse_kernels.backends._cuda_native import ELEMENTS, activation, as_float, pointer
from sparse_kernels.geometry import Conv2dGeometry
from sparse_kernels.layout import empty_feature_major

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
    "linear",
    "linear_dgrad",
    "linear_wgrad",
    "max_pool2d",
    "max_pool2d_backward",
    "supports",
]

_SERVED = (
    "linear",
    "linear_dgrad",
    "linear_wgrad",
    "conv2d",
    "conv2d_dgrad",
    "conv2d_wgrad",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_pool",
    "batch_norm_pool_backward",
    "max_pool2d",
    "max_pool2d_backward",
    "avg_pool2d",
    "avg_pool2d_backward",
)
_HIGHEST = 32  # kMaxBlockHeight there


def supports(
    op: str, x: Tensor, values: Tensor | None = None, block: tuple[int, int] | None = None
) -> str | None:
    """None if this backend computes ``op`` on tensors like these, else the reason why not.

    ``block`` (bh, bw) stands for the values where the operator makes them: weight gradients.
    """
    if x.device.type != "cuda":
        return f"serves CUDA tensors, got device {x.device}"
    module = _cuda_native.native_or_none()
    if module is None:
        return "the native module is not built (see `sparse-kernels info`)"
    built = module.build_info()
    if not built["cuda"]:
        return f"built without CUDA: {built['why_no_cuda']}"
    return _why_not(op, x.dtype, values, block) or _unusable(x.device.index or 0)


@functools.lru_cache
def _unusable(device: int) -> str | None:
    """Why no kernel runs on this device, if so: its architecture or the driver. Asked once."""
    why = str(_cuda_native.native().cuda_unusable(device))
    return f"cannot run here: {why}" if why else None


def _why_not(
    op: str, dtype: torch.dtype, values: Tensor | None, block: tuple[int, int] | None
) -> str | None:
    if op not in _SERVED:
        return f"has kernels for {', '.join(_SERVED)} only"
    if dtype not in ELEMENTS:
        return f"computes float32, float16 and bfloat16, got {dtype}"
    if values is not None:
        if values.dtype not in ELEMENTS:
            return f"takes float32, float16 or bfloat16 values, got {values.dtype}"
        block = (int(values.shape[1]), int(values.shape[2]))
    if block is None:
        return None
    if _cuda_blocks.is_served(block):
        return _cuda_blocks.why_not(op, dtype)
    if block[1] != 1 or block[0] > _HIGHEST:
        return (
            f"has kernels for blocks (V, 1), V up to {_HIGHEST}, (16, 16) and (32, 32), "
            f"got block {block}"
        )
    return None


def writes_batch_major(block: tuple[int, int]) -> bool:
    """Whether results for this block are batch-major or channels_last, not feature-major."""
    return _cuda_blocks.is_served(block)


def _is_tensor_cores(values: Tensor) -> bool:
    return _cuda_blocks.is_served((int(values.shape[1]), int(values.shape[2])))


# -- what a launcher takes -------------------------------------------------------------------------


def _geometry(x_shape: Sequence[int], out_hw: Sequence[int], geometry: Sequence[int]) -> list[int]:
    """The 18 integers of csrc/bind_geometry.h."""
    return [x_shape[0], *x_shape[2:], *out_hw, *geometry]


def _product(
    kernel: str,
    x: Tensor,
    values: Tensor,
    index: tuple[Tensor, Tensor],
    bias: Tensor | None,
    shape: Sequence[int],
    geometry: list[int],
    relu: bool,
    variant: int,
) -> Tensor:
    """Forward of any layer: y of `shape`."""
    xs, vs = activation(x), as_float(values)
    bs = None if bias is None else as_float(bias)
    y = empty_feature_major(shape, x.dtype, x.device)
    order = _cuda_variants.rows_by_length(index[0]) if variant else None
    _cuda_native.native().cuda_product(
        kernel,
        y.data_ptr(),
        xs.data_ptr(),
        vs.data_ptr(),
        pointer(bs),
        *(tensor.data_ptr() for tensor in index),
        geometry,
        values.shape[1],
        relu,
        variant,
        ELEMENTS[x.dtype],
        *_cuda_native.place(x),
        pointer(order),
    )
    return y


def _dgrad(
    kernel: str,
    grad: Tensor,
    values: Tensor,
    index: tuple[Tensor, Tensor, Tensor],
    shape: Sequence[int],
    geometry: list[int],
    groups: int,
    variant: int,
) -> Tensor:
    """Input gradient of any layer: dx of `shape`."""
    gs, vs = activation(grad), as_float(values)
    dx = empty_feature_major(shape, grad.dtype, grad.device)
    order = _cuda_variants.channels_by_length(index[0], shape[1], groups) if variant else None
    _cuda_native.native().cuda_dgrad(
        kernel,
        dx.data_ptr(),
        gs.data_ptr(),
        vs.data_ptr(),
        *(tensor.data_ptr() for tensor in index),
        geometry,
        values.shape[1],
        ELEMENTS[grad.dtype],
        *_cuda_native.place(grad),
        variant,
        pointer(order),
    )
    return dx


def _wgrad(
    kernel: str,
    grad: Tensor,
    x: Tensor,
    index: tuple[Tensor, Tensor],
    block: tuple[int, int],
    geometry: list[int],
    variant: str | None,
    site: tuple[Sequence[int], Sequence[int]],
) -> Tensor:
    """Gradient of the values [capacity, bh, 1], float32; site: image and convolution."""
    if why := _why_not(kernel, x.dtype, None, block):
        raise ValueError(f"{kernel}: the CUDA backend {why}")
    gs, xs = activation(grad.to(x.dtype)), activation(x)
    capacity = index[1].shape[0]
    number = _cuda_variants.number(variant, kernel, gs, (capacity, *block), *site)
    if variant is None and xs.data_ptr() % 16:  # a view, as in `number` for the gradient
        number = min(number, _cuda_variants.NUMBERS["direct"])
    dvalues = torch.empty((capacity, *block), dtype=torch.float32, device=x.device)
    size = _cuda_native.native().cuda_wgrad_workspace(geometry, block[0], capacity, number)
    workspace = torch.empty(size // 4, dtype=torch.float32, device=x.device)
    _cuda_native.native().cuda_wgrad(
        kernel,
        dvalues.data_ptr(),
        gs.data_ptr(),
        xs.data_ptr(),
        *(tensor.data_ptr() for tensor in index),
        workspace.data_ptr(),
        size,
        geometry,
        block[0],
        capacity,
        ELEMENTS[x.dtype],
        *_cuda_native.place(x),
        number,
    )
    return dvalues


def _one_pixel(rows: int, cols: int) -> Conv2dGeometry:
    """A linear layer as the convolution of one pixel that _cuda_variants.py knows it as."""
    return Conv2dGeometry(rows, cols, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1)


# -- linear ----------------------------------------------------------------------------------------


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
    variant: str | None = None,
) -> Tensor:
    """Y = X S^T (+ bias, ReLU); x [N, in] -> y [N, out], feature-major, x's dtype.

    ``variant`` of elements and vectors, as of the functions like this: "direct" or "staged"
    (_cuda_variants.py), None for what ``tune`` or the rule chose. ValueError where it does not
    serve the shape.
    """
    if _is_tensor_cores(values):
        return _cuda_blocks.product(
            "linear", x, values, (crow, col), bias, out_features, relu, None
        )
    batch, cols = x.shape
    shape, geometry = (batch, out_features), [out_features, cols, batch]
    site = ((1, 1), _one_pixel(out_features, cols))
    number = _cuda_variants.number(variant, "linear", x, values.shape, *site)
    return _product("linear", x, values, (crow, col), bias, shape, geometry, relu, number)


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
    variant: str | None = None,
) -> Tensor:
    """dX = dY S; grad [N, out] -> dx [N, in], feature-major, grad's dtype."""
    if _is_tensor_cores(values):
        index, size = (t_crow, t_row, t_perm), (grad.shape[0], in_features)
        return _cuda_blocks.dgrad("linear_dgrad", grad, values, index, size, None)
    batch, rows = grad.shape
    shape, geometry = (batch, in_features), [rows, in_features, batch]
    site = ((1, 1), _one_pixel(rows, in_features))
    number = _cuda_variants.number(variant, "linear_dgrad", grad, values.shape, *site)
    index = (t_crow, t_row, t_perm)
    return _dgrad("linear_dgrad", grad, values, index, shape, geometry, 1, number)


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
    variant: str | None = None,
) -> Tensor:
    """dvalues [capacity, bh, bw] float32 = dY^T X at the pattern; zero tail, zero outside."""
    if _cuda_blocks.is_served((bh, bw)):
        return _cuda_blocks.wgrad("linear_wgrad", grad, x, (crow, col), (bh, bw), None)
    geometry = [grad.shape[1], x.shape[1], x.shape[0]]
    site = ((1, 1), _one_pixel(grad.shape[1], x.shape[1]))
    return _wgrad("linear_wgrad", grad, x, (crow, col), (bh, bw), geometry, variant, site)


# -- convolution -----------------------------------------------------------------------------------


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
    variant: str | None = None,
) -> Tensor:
    """Sparse convolution; x [N, C, H, W] -> y [N, C_out, H_out, W_out], feature-major."""
    g = Conv2dGeometry(*geometry)
    if _is_tensor_cores(values):
        return _cuda_blocks.product(
            "conv2d", x, values, (crow, col), bias, g.out_channels, relu, geometry
        )
    out_hw = g.output_size(x.shape[2], x.shape[3])
    shape, sizes = (x.shape[0], g.out_channels, *out_hw), _geometry(x.shape, out_hw, geometry)
    number = _cuda_variants.number(variant, "conv2d", x, values.shape, x.shape[2:], geometry)
    return _product("conv2d", x, values, (crow, col), bias, shape, sizes, relu, number)


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
    variant: str | None = None,
) -> Tensor:
    """dx [N, C_in, in_height, in_width], feature-major, from grad [N, C_out, H_out, W_out]."""
    g = Conv2dGeometry(*geometry)
    shape = (grad.shape[0], g.in_channels, in_height, in_width)
    if _is_tensor_cores(values):
        index = (t_crow, t_row, t_perm)
        return _cuda_blocks.dgrad("conv2d_dgrad", grad, values, index, shape, geometry)
    sizes = _geometry(shape, grad.shape[2:], geometry)
    number = _cuda_variants.number(variant, "conv2d_dgrad", grad, values.shape, shape[2:], geometry)
    index = (t_crow, t_row, t_perm)
    return _dgrad("conv2d_dgrad", grad, values, index, shape, sizes, g.groups, number)


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
    variant: str | None = None,
) -> Tensor:
    """dvalues [capacity, bh, bw] float32 of the convolution; zero tail, zero outside."""
    if _cuda_blocks.is_served((bh, bw)):
        return _cuda_blocks.wgrad("conv2d_wgrad", grad, x, (crow, col), (bh, bw), geometry)
    sizes = _geometry(x.shape, grad.shape[2:], geometry)
    site = (x.shape[2:], geometry)
    return _wgrad("conv2d_wgrad", grad, x, (crow, col), (bh, bw), sizes, variant, site)
