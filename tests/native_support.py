"""What the tests of the native kernels share: addresses and errors."""

from __future__ import annotations

from torch import Tensor


def address(t: Tensor | None) -> int:
    """What a native kernel takes for a tensor; 0 for None."""
    return 0 if t is None else t.data_ptr()


def error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||, 0 for two empty tensors, infinite if the shapes differ."""
    if got.shape != want.shape:
        return float("inf")
    if want.numel() == 0:
        return 0.0
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()
