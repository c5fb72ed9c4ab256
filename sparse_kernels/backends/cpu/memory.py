"""Memory of large activations and gradients, from the native pool (csrc/cpu/buffer_pool.h)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_kernels._load import native

#: Bytes from which a tensor comes from the pool; below, torch's allocator reuses memory well.
POOLED_FROM = 1 << 20


def empty_strided(shape: Sequence[int], strides: Sequence[int], floats: int) -> Tensor:
    """An uninitialised float32 CPU tensor of ``floats`` elements, dense in the given strides.

    Not a view of anything, as far as autograd can see: it may be written in place.  And nobody else
    holds its storage: autograd then sums gradients in place instead of into new memory.
    """
    if 4 * floats < POOLED_FROM:
        return torch.empty_strided(shape, strides, dtype=torch.float32)
    flat = torch.frombuffer(native().PooledBuffer(4 * floats), dtype=torch.float32)
    out = torch.empty(0, dtype=torch.float32)
    # From the tensor: a storage that Python has seen counts one more owner for ever.
    return out.set_(flat, 0, shape, strides)  # type: ignore[call-overload]


def release() -> None:
    """Give the memory that no tensor uses back to the system."""
    native().release_pooled()
