"""Normalisation and the paper's CIFAR augmentation, a whole batch at a time.

Source: the official sparse momentum scripts: reflect-pad by 4, random crop to the old size, random
horizontal flip, then subtract mean and divide by standard deviation.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 [N, C, H, W] -> float32 of the same shape: (x / 255 - mean) / std per channel."""
    if images.shape[1] != len(mean) or len(mean) != len(std):
        raise ValueError(
            f"normalize: images have {images.shape[1]} channels, mean {len(mean)}, std {len(std)}; "
            "expected three equal numbers"
        )
    scale, shift = _scale_and_shift(tuple(mean), tuple(std))
    return images.to(torch.float32).mul_(scale).sub_(shift)


@functools.lru_cache(maxsize=8)  # once per data set, not per batch
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    scale = torch.tensor([1.0 / (255.0 * s) for s in std]).view(1, -1, 1, 1)
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)]).view(1, -1, 1, 1)
    return scale, shift


def crop_and_flip(images: Tensor, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Reflect-pad [N, C, H, W] by ``pad``, crop H x W at random, flip half of them; any dtype.

    Nothing is padded really: each image reads its rows and columns through reflected indices.
    """
    n, channels, height, width = images.shape
    if pad >= min(height, width):
        raise ValueError(
            f"crop_and_flip: pad {pad} must be below the image size {height} x {width}"
        )
    top, left = torch.randint(0, 2 * pad + 1, (2, n, 1), generator=generator)
    flip = torch.randint(0, 2, (n, 1), generator=generator, dtype=torch.bool)
    rows = _reflect(torch.arange(height) + top - pad, height)  # [N, H]
    columns = torch.arange(width).expand(n, width)
    columns = torch.where(flip, width - 1 - columns, columns)
    columns = _reflect(columns + left - pad, width)  # [N, W]
    sample = torch.arange(n).view(n, 1, 1, 1)
    channel = torch.arange(channels).view(1, channels, 1, 1)
    return images[sample, channel, rows.view(n, 1, height, 1), columns.view(n, 1, 1, width)]


def _reflect(index: Tensor, size: int) -> Tensor:
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)
