"""Launchers of the CUDA backend's tensor-core kernels: blocks of 16 x 16 and 32 x 32.

Activations are batch-major ([N, F] contiguous) or channels_last, and so are the results. Values are
cast to the activations' dtype once per call, sums and gradients of values are float32. float32
activations are multiplied in TF32, and served only where torch allows that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_kernels.backends import _cuda_native
from sparse_kernels.backends._cuda_native import ELEMENTS, as_float, pointer
from sparse_kernels.backends.triton.operands import allows_tf32, batch_major, empty_images
from sparse_kernels.geometry import Conv2dGeometry

SIDES = (16, 32)


def is_served(block: tuple[int, int]) -> bool:
    """Whether the block is one of these kernels'."""
    return block[0] == block[1] and block[0] in SIDES


def why_not(op: str, dtype: torch.dtype) -> str | None:
    """None if ``op`` is computed on activations of ``dtype``, else the reason why not."""
    if dtype == torch.float32 and not allows_tf32(op):
        flag = "cudnn.conv" if op.startswith("conv2d") else "cuda.matmul"
        return (
            "multiplies float32 blocks in TF32, which torch does not allow here "
            f"(torch.backends.{flag}.fp32_precision = 'tf32' would)"
        )
    return None


def _refuse(op: str, dtype: torch.dtype) -> None:
    """The flag may have changed since the backend was chosen."""
    if why := why_not(op, dtype):
        raise ValueError(f"{op}: the CUDA backend {why}")


def _aligned(x: Tensor) -> Tensor:
    """x itself, or a copy where it does not begin at a multiple of 16 bytes."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _sizes(
    shape: Sequence[int], out_hw: Sequence[int], geometry: Sequence[int] | None, features: int
) -> list[int]:
    """What the bindings take: [rows, cols, batch], or the 18 integers of csrc/bind_geometry.h."""
    if geometry is None:
        return [features, shape[1], shape[0]]
    return [shape[0], *shape[2:], *out_hw, *geometry]


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    if len(shape) == 2:
        return torch.empty(tuple(shape), dtype=like.dtype, device=like.device)
    n, c, h, w = shape
    return empty_images((n, c, h, w), like)


def product(
    op: str,
    x: Tensor,
    values: Tensor,
    index: tuple[Tensor, Tensor],
    bias: Tensor | None,
    rows: int,
    relu: bool,
    geometry: Sequence[int] | None,
) -> Tensor:
    """y [N, rows] of x [N, F], or [N, rows, H', W'] of x [N, C, H, W] by ``geometry``."""
    _refuse(op, x.dtype)
    xs = batch_major(x)
    out_hw = () if geometry is None else Conv2dGeometry(*geometry).output_size(*x.shape[2:])
    y = _empty((x.shape[0], rows, *out_hw), x)
    vs = _aligned(values.detach().to(x.dtype).contiguous())
    bs = None if bias is None else as_float(bias)
    _cuda_native.native().cuda_block_product(
        op,
        y.data_ptr(),
        xs.data_ptr(),
        vs.data_ptr(),
        pointer(bs),
        *(tensor.data_ptr() for tensor in index),
        _sizes(x.shape, out_hw, geometry, rows),
        values.shape[1],
        relu,
        ELEMENTS[x.dtype],
        *_cuda_native.place(x),
    )
    return y


def dgrad(
    op: str,
    grad: Tensor,
    values: Tensor,
    index: tuple[Tensor, Tensor, Tensor],
    shape: Sequence[int],
    geometry: Sequence[int] | None,
) -> Tensor:
    """dx of ``shape`` from grad [N, rows] or [N, rows, H', W']."""
    _refuse(op, grad.dtype)
    gs = batch_major(grad)
    dx = _empty(shape, grad)
    vs = _aligned(values.detach().to(grad.dtype).contiguous())
    _cuda_native.native().cuda_block_dgrad(
        op,
        dx.data_ptr(),
        gs.data_ptr(),
        vs.data_ptr(),
        *(tensor.data_ptr() for tensor in index),
        _sizes(shape, grad.shape[2:], geometry, grad.shape[1]),
        values.shape[1],
        ELEMENTS[grad.dtype],
        *_cuda_native.place(grad),
    )
    return dx


def wgrad(
    op: str,
    grad: Tensor,
    x: Tensor,
    index: tuple[Tensor, Tensor],
    block: tuple[int, int],
    geometry: Sequence[int] | None,
) -> Tensor:
    """dvalues [capacity, *block] float32; zero tail, zero outside of partial blocks."""
    _refuse(op, x.dtype)
    gs, xs = batch_major(grad.to(x.dtype)), batch_major(x)
    capacity, element = index[1].shape[0], ELEMENTS[x.dtype]
    sizes = _sizes(x.shape, grad.shape[2:], geometry, grad.shape[1])
    dvalues = torch.empty((capacity, *block), dtype=torch.float32, device=x.device)
    size = _cuda_native.native().cuda_block_wgrad_workspace(sizes, block[0], capacity, element)
    workspace = torch.empty(size // 4, dtype=torch.float32, device=x.device)
    _cuda_native.native().cuda_block_wgrad(
        op,
        dvalues.data_ptr(),
        gs.data_ptr(),
        xs.data_ptr(),
        *(tensor.data_ptr() for tensor in index),
        workspace.data_ptr(),
        size,
        sizes,
        block[0],
        capacity,
        element,
        *_cuda_native.place(x),
    )
    return dvalues
