"""Feature-major tensors as torch's kernels know them, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_kernels.layout import (
    empty_feature_major,
    feature_major_strides,
    is_feature_major,
    to_feature_major,
)


def images(x: Tensor) -> Tensor:
    """x [N, C, H, W] as channels_last [C, N, H, W] over the same memory (or a counted copy's).

    Feature-major memory is [C, H, W, N]: images C, channels N, channels innermost.
    """
    return exact(to_feature_major(x.detach())).transpose(0, 1)


def of_images(y: Tensor) -> Tensor:
    """What torch computed of ``images``, [C, N, H, W], as feature-major [N, C, H, W]."""
    return exact(y.transpose(0, 1))


def planes(x: Tensor) -> Tensor:
    """x [N, C] or [N, C, H, W] as contiguous [1, C, points] over the same memory (or a copy's)."""
    x = exact(to_feature_major(x.detach()))
    return x.movedim(0, -1).reshape(1, x.shape[1], -1)


def of_planes(y: Tensor, shape: torch.Size) -> Tensor:
    """[1, C, points] as feature-major tensor of ``shape`` [N, C, ...]."""
    return y.contiguous().as_strided(shape, feature_major_strides(shape))


def exact(x: Tensor) -> Tensor:
    """x with the very strides of a feature-major tensor; a copy if its numbers lie otherwise.

    Where a size is 1 torch leaves strides open; fake kernels and torch.compile do not.
    """
    if is_feature_major(x):
        return x.as_strided(x.shape, feature_major_strides(x.shape))
    return empty_feature_major(x.shape, x.dtype, x.device).copy_(x)
