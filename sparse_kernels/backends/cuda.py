"""The CUDA backend: the native kernels compiled by nvcc, for GPU tensors.

Serves the element-sparse (block (1, 1)) linear layer; what it does not serve, ``supports`` says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_kernels._load import native, native_or_none
from sparse_kernels.layout import empty_feature_major, to_feature_major

__all__ = ["linear", "linear_dgrad", "supports"]

_SERVED = ("linear", "linear_dgrad")


def supports(
    op: str, x: Tensor, values: Tensor | None = None, block: tuple[int, int] | None = None
) -> str | None:
    """None if this backend computes ``op`` on tensors like these, else the reason why not."""
    if x.device.type != "cuda":
        return f"serves CUDA tensors, got device {x.device}"
    module = native_or_none()
    if module is None:
        return "the native module is not built (see `sparse-kernels info`)"
    built = module.build_info()
    if not built["cuda"]:
        return f"built without CUDA: {built['why_no_cuda']}"
    if op not in _SERVED:
        return f"has kernels for {', '.join(_SERVED)} only"
    if x.dtype != torch.float32:
        return f"computes float32, got {x.dtype}"
    if values is not None and values.dtype != torch.float32:
        return f"takes float32 values, got {values.dtype}"
    if values is not None and tuple(values.shape[1:]) != (1, 1):
        return f"has element (1, 1) kernels only, got block {tuple(values.shape[1:])}"
    return None


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
) -> Tensor:
    """Y = X S^T (+ bias, ReLU); x [N, in] float32 -> y [N, out], feature-major.

    values [capacity, 1, 1]; all tensors on x's GPU. Queued on x's device's current stream.
    Raises RuntimeError with CUDA's message when the launch fails.
    """
    return _spmm(x, values, crow, col, bias, out_features, relu)


def linear_dgrad(
    grad: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    t_crow: Tensor,
    t_row: Tensor,
    t_perm: Tensor,
    in_features: int,
) -> Tensor:
    """dX = dY S; grad [N, out] float32 -> dx [N, in], feature-major.

    The same SpMM over the transposed index, with the values brought into its order first: one pass
    over the values, against one over the activations for every one of them.
    """
    transposed = values.flatten().index_select(0, t_perm)
    return _spmm(grad, transposed, t_crow, t_row, None, in_features, False)


def _spmm(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    rows: int,
    relu: bool,
) -> Tensor:
    """y [N, rows] of the CSR matrix (crow, col, values) [rows, cols] times x [N, cols]."""
    batch, cols = x.shape
    xs, vs = to_feature_major(x.detach()), values.detach().contiguous()
    bs = None if bias is None else bias.detach().to(torch.float32).contiguous()
    y = empty_feature_major((batch, rows), torch.float32, x.device)
    native().cuda_linear(
        y.data_ptr(),
        xs.data_ptr(),
        vs.data_ptr(),
        0 if bs is None else bs.data_ptr(),
        crow.data_ptr(),
        col.data_ptr(),
        rows,
        cols,
        batch,
        relu,
        x.device.index,
        torch.cuda.current_stream(x.device).cuda_stream,
    )
    return y
