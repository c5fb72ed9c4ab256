"""Probes: leaves that are never read, whose gradients are a layer's for weights that do not exist.

A dense probe [rows, cols] is handed to the layer's operator. A sampling one [blocks, bh, bw] speaks
of the blocks of a pattern of its own, and the layer's output passes through its autograd Function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_kernels import ops
from sparse_kernels.pattern import SparsityPattern

if TYPE_CHECKING:
    from sparse_kernels.nn.base import SparseLayer


def make(layer: SparseLayer, pattern: SparsityPattern | None) -> Tensor:
    """A probe for the whole matrix or for ``pattern``: one number, expanded.

    Raises ValueError for a pattern of another geometry than the layer's.
    """
    shape: tuple[int, ...] = layer.matrix_shape
    if pattern is not None:
        own = (layer.matrix_shape, layer.block, layer.row_parts, layer.col_parts)
        came = (pattern.shape, pattern.block, pattern.row_parts, pattern.col_parts)
        if came != own:
            raise ValueError(
                f"the pattern of a probe must have the layer's matrix, block and parts {own}, got "
                f"{came}"
            )
        shape = (pattern.capacity, *layer.block)
    one = torch.zeros((), dtype=layer.values.dtype, device=layer.values.device)
    return one.expand(shape).requires_grad_()


def dense(layer: SparseLayer) -> Tensor | None:
    """The layer's probe, if it is for the whole matrix."""
    return layer.probe if layer.probe_pattern is None else None


def attach(
    layer: SparseLayer, x: Tensor, y: Tensor, geometry: Sequence[int] | None = None
) -> Tensor:
    """The layer's output ``y`` for ``x``, whose backward pass also serves a sampling probe."""
    if layer.probe is None or layer.probe_pattern is None or not torch.is_grad_enabled():
        return y
    return ops.sampled_gradient(y, x, layer.probe, layer.probe_pattern, geometry)
