"""What the tests of sparsify share: comparisons with the dense model, the report in short."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_kernels import nn as snn


def compare(first: nn.Module, second: nn.Module, x: Tensor) -> None:
    """Equal outputs and input gradients, training and evaluating."""
    for mode in (True, False):
        first.train(mode)
        second.train(mode)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, expected = first(ours), second(theirs)
        y.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5, check_stride=False)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4, check_stride=False)


def masked_twin(dense: nn.Module, sparse: nn.Module) -> nn.Module:
    """``dense`` (the model before sparsify) with zeros where ``sparse`` dropped weights."""
    layers = dict(sparse.named_modules())
    for name, module in dense.named_modules():
        layer = layers[name]
        if isinstance(layer, snn.SparseLayer):
            with torch.no_grad():
                module.weight.mul_(layer.matrix_to_weight(layer.pattern.mask()))
    return dense


def actions(report: snn.SparsifyReport) -> dict[str, str]:
    return {row.name: row.action for row in report}
