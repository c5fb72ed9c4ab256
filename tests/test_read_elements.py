"""In a step with a probe the gradient of element values is read from the dense one."""

from __future__ import annotations

import pytest
import torch

from sparse_kernels.nn.conv import SparseConv2d
from sparse_kernels.nn.linear import SparseLinear
from sparse_kernels.ops._library import read_elements
from sparse_kernels.pattern import SparsityPattern


@pytest.mark.parametrize(
    ("shape", "nnzb", "capacity"),
    [((5, 7), 9, 20), ((1, 6), 3, 3), ((6, 1), 4, 9), ((4, 4), 0, 3), ((3, 4), 12, 12)],
    ids=str,
)
def test_reads_the_stored_elements_and_zeroes_the_tail(
    shape: tuple[int, int], nnzb: int, capacity: int
) -> None:
    pattern = SparsityPattern.random(shape, nnzb=nnzb, capacity=capacity)
    dense = torch.arange(1.0, shape[0] * shape[1] + 1).view(shape)
    pattern.col_indices[nnzb:] = 2**31 - 1  # never to be followed
    found = read_elements(dense, pattern.crow_indices, pattern.col_indices)
    assert torch.equal(found, pattern.compress(dense))


@pytest.mark.parametrize("block", [(1, 1), (2, 1)], ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv", "groups"])
def test_a_probe_changes_no_gradient(kind: str, block: tuple[int, int]) -> None:
    if kind == "linear":
        layer, x = SparseLinear(9, 8, density=0.4, block=block, capacity=80), torch.randn(5, 9)
    else:
        groups = 2 if kind == "groups" else 1
        layer = SparseConv2d(
            4, 8, 3, stride=2, padding=1, density=0.4, groups=groups, block=block, capacity=300
        )
        x = torch.randn(3, 4, 6, 5)
    gradients = []
    for probed in (False, True):
        if probed:
            layer.make_probe()
        layer.zero_grad()
        layer(x).square().sum().backward()
        gradients.append(layer.values.grad)
    torch.testing.assert_close(*gradients)
    assert layer.probe is not None and layer.probe.grad is not None
    if block == (1, 1):
        assert torch.equal(layer.pattern.compress(layer.probe.grad), layer.values.grad)


def test_a_second_derivative_goes_through_the_sampled_product() -> None:
    layer = SparseConv2d(3, 4, 3, padding=1, density=0.5)
    layer.make_probe()
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = layer(x).square().sum()
    (first,) = torch.autograd.grad(loss, layer.values, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert bool(second.isfinite().all()) and float(second.abs().sum()) > 0
