"""Weights on their way between a sparse layer and torch's dense one."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from sparse_kernels.pattern import SparsityPattern

if TYPE_CHECKING:
    from sparse_kernels.nn.base import SparseLayer

_Dense = TypeVar("_Dense", nn.Linear, nn.Conv2d)


def take(
    layer: SparseLayer, module: nn.Linear | nn.Conv2d, pattern: SparsityPattern, matrix: Tensor
) -> None:
    """Fill a layer built on the meta device from ``module``, whose weight is ``matrix``."""
    layer._register_pattern(pattern.clone())
    with torch.no_grad():
        layer.values = nn.Parameter(pattern.compress(matrix), module.weight.requires_grad)
        if module.bias is not None:
            layer.bias = nn.Parameter(module.bias.detach().clone(), module.bias.requires_grad)
    layer.train(module.training)


def filled(module: _Dense, layer: SparseLayer) -> _Dense:
    """A dense module built on the meta device, given the layer's weight and bias."""
    with torch.no_grad():
        weight = layer.matrix_to_weight(layer.dense_matrix()).contiguous()
        module.weight = nn.Parameter(weight, layer.values.requires_grad)
        if layer.bias is not None:
            module.bias = nn.Parameter(layer.bias.detach().clone(), layer.bias.requires_grad)
    return module.train(layer.training)
