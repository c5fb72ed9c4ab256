"""Dense weight gradients of the growth window, by cuBLAS and cuDNN; see the package's docstring."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from sparse_kernels.geometry import Conv2dGeometry


def linear_wgrad_dense(grad: Tensor, x: Tensor) -> Tensor:
    """Dense weight gradient float32 [out, in] = grad [N, out]^T x [N, in].

    16-bit operands are multiplied as such on a GPU, and summed and returned in float32.
    """
    grad, x = grad.detach(), x.detach()
    if grad.dtype == x.dtype and x.dtype != torch.float32 and x.device.type == "cuda":
        return torch.mm(grad.t(), x, out_dtype=torch.float32)
    return grad.to(torch.float32).t() @ x.to(torch.float32)


def conv2d_wgrad_dense(grad: Tensor, x: Tensor, geometry: Sequence[int]) -> Tensor:
    """Dense weight gradient float32 [C_out, kh*kw*C_in/groups], taps major, channels fastest.

    cuDNN would round a 16-bit gradient of the weight to 16 bits. So 16-bit operands are widened:
    with the TF32 products that torch allows by default that loses no bit of them.
    """
    g = Conv2dGeometry(*geometry)
    if 0 in (x.numel(), grad.numel()):
        return torch.zeros(g.matrix_shape, dtype=torch.float32, device=x.device)
    x, grad = x.detach().to(torch.float32), grad.detach().to(torch.float32)
    padding = (g.pad_top, g.pad_left)
    if padding != (g.pad_bottom, g.pad_right):  # torch's own padding is symmetric
        x = F.pad(x, (g.pad_left, g.pad_right, g.pad_top, g.pad_bottom))
        padding = (0, 0)
    weight = conv2d_weight(
        _for_cudnn(x),
        (g.out_channels, g.in_channels // g.groups, g.kernel_height, g.kernel_width),
        _for_cudnn(grad),
        stride=(g.stride_h, g.stride_w),
        padding=padding,
        dilation=(g.dilation_h, g.dilation_w),
        groups=g.groups,
    )
    return weight.permute(0, 2, 3, 1).reshape(g.matrix_shape)


def _for_cudnn(x: Tensor) -> Tensor:
    """channels_last: the matrix's own order, and what tensor cores read; feature-major is copied.

    Contiguous images stay as they are.
    """
    return x if x.is_contiguous() else x.contiguous(memory_format=torch.channels_last)
