"""Dropout of the reference backend: Philox in integers of torch; see reference.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._reference_pool import compute_dtype

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
#: Elements that 64 consecutive counters serve.
BLOCK = 256


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, both below 2^32, in integers of 63 bits."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = high + (low >> 16)
    return middle >> 16, ((middle << 16) | (low & 0xFFFF)) & _LOW


def philox(counter: Tensor, seed: int, rounds: int = 7) -> Tensor:
    """Words [4, n] below 2^32 of counters [n], int64: Philox4x32 (Salmon et al., SC'11)."""
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    c0, c1 = counter & _LOW, (counter >> 32) & _LOW
    c2 = c3 = torch.zeros_like(counter)
    for _ in range(rounds):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return torch.stack([c0, c1, c2, c3])


def words(count: int, seed: int, device: torch.device) -> Tensor:
    """The signed 32-bit words of elements 0 to count - 1, as int64 [count].

    Words 0 and 1 of a block's counters lie in turn in its first half, words 2 and 3 in its second.
    """
    blocks = -(-count // BLOCK)
    counter = torch.arange(blocks * (BLOCK // 4), dtype=torch.int64, device=device)
    drawn = philox(counter, seed).view(2, 2, blocks, BLOCK // 4)  # half, turn, block, counter
    placed = drawn.permute(2, 0, 3, 1).reshape(-1)[:count]
    return torch.where(placed < 2**31, placed, placed - 2**32)


def dropout(x: Tensor, seed: Tensor, p: float, stride: Sequence[int]) -> Tensor:
    """x * noise with strides ``stride``: 0 with probability p, else 1 / (1 - p)."""
    least = min(int(p * 2.0**32 + 0.5), _LOW) - 2**31
    kept = words(x.numel(), int(seed), x.device) >= least
    dtype = compute_dtype(x)
    noise = kept.to(dtype) * (1 / (1 - p) if p < 1 else 0.0)
    y = torch.empty_strided(x.shape, stride, dtype=x.dtype, device=x.device)
    return y.copy_(x.to(dtype) * noise.as_strided(x.shape, stride))
