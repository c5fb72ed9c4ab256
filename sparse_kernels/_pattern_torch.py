"""Exchange of patterns with torch.sparse_csr and torch.sparse_bsr matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from .pattern import SparsityPattern


def to_torch(pattern: SparsityPattern, values: Tensor) -> Tensor:
    """See SparsityPattern.to_torch."""
    pattern._check_values(values)
    if pattern._grid.has_partial_blocks:
        raise ValueError(
            f"to_torch: torch.sparse_bsr needs blocks that divide the segments, got block "
            f"{pattern.block} over {pattern._grid.seg_rows} x {pattern._grid.seg_cols}; "
            f" pattern.expand(values), or a block that divides"
        )
    col = pattern.col_indices[: pattern.nnzb]
    stored = values.detach()[: pattern.nnzb]
    if pattern.block == (1, 1):
        return torch.sparse_csr_tensor(
            pattern.crow_indices,
            col,
            stored.reshape(-1),
            pattern.shape,
            check_invariants=False,
        )
    return torch.sparse_bsr_tensor(
        pattern.crow_indices, col, stored, pattern.shape, check_invariants=False
    )


def from_torch(cls: type[SparsityPattern], tensor: Tensor) -> tuple[SparsityPattern, Tensor]:
    """See SparsityPattern.from_torch."""
    layout = tensor.layout if isinstance(tensor, Tensor) else type(tensor).__name__
    if layout not in (torch.sparse_csr, torch.sparse_bsr):
        raise TypeError(
            f"from_torch: expected a torch.sparse_csr or sparse_bsr tensor, got {layout}; "
            f"convert with tensor.to_sparse_csr() or tensor.to_sparse_bsr(block)"
        )
    values = tensor.values().detach()
    if tensor.ndim != 2 or values.ndim != (1 if layout == torch.sparse_csr else 3):
        raise ValueError(
            f"from_torch: expected a matrix of scalars, got shape {tuple(tensor.shape)}, values "
            f"{tuple(values.shape)}; pass the matrices of batched or hybrid tensors singly"
        )
    block = (1, 1) if layout == torch.sparse_csr else (values.shape[1], values.shape[2])
    crow, col = tensor.crow_indices(), tensor.col_indices()
    shape = (tensor.shape[0], tensor.shape[1])
    pattern = cls.from_csr(crow, col, shape, block)
    values = values.reshape(-1, *block)
    if pattern.nnzb == 0:
        return pattern, values.new_zeros(1, *block)
    # from_csr has checked both, so sharing them cannot smuggle in a bad index.
    if crow.dtype == torch.int32 and crow.is_contiguous() and col.is_contiguous():
        pattern.crow_indices, pattern.col_indices = crow, col
    return pattern, values
