"""Every operator against float64 dense torch: any shape, block, stride, instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from parity import worst

from sparse_kernels import ops
from sparse_kernels._load import native
from sparse_kernels.pattern import SparsityPattern

COUNT = 300


@pytest.fixture(params=native().supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native().isa()
    native().set_isa(request.param)
    yield request.param
    native().set_isa(before)


@pytest.mark.parametrize("seed", range(2))
def test_float32_on_every_instruction_set(isa: str, seed: int) -> None:
    table = worst(COUNT // 2, 1000 * seed, torch.float32)
    assert {"output", "dx", "dvalues", "dbias"} == set(table)
    assert all(error <= 1e-5 for error, _ in table.values()), table


def test_float64_on_the_reference() -> None:
    table = worst(COUNT // 2, 0, torch.float64)
    assert all(error <= 1e-12 for error, _ in table.values()), table


def test_expanded_gradient_of_a_sum() -> None:
    pattern = SparsityPattern.random((7, 5), density=0.5)
    values = pattern.compress(torch.randn(7, 5)).requires_grad_()
    x = torch.randn(6, 5, requires_grad=True)
    ops.linear(x, values, *pattern.tensors(), out_features=7).sum().backward()
    weight = pattern.expand(values.detach())
    assert torch.allclose(x.grad, weight.sum(0).expand(6, 5), atol=1e-6)
    expected = pattern.compress(x.detach().sum(0).expand(7, 5).contiguous())
    assert torch.allclose(values.grad, expected, atol=1e-6)


def test_results_do_not_depend_on_the_number_of_threads(isa: str) -> None:
    pattern = SparsityPattern.random((24, 9 * 16), density=0.2, col_parts=9)
    values = pattern.compress(torch.randn(24, 144)).requires_grad_()
    x = torch.randn(37, 16, 9, 7, requires_grad=True)
    geometry = [24, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y = ops.conv2d(x, values, *pattern.tensors(), geometry=geometry)
        results.append((y.detach(), *torch.autograd.grad(y, (x, values), y.detach())))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
