"""What the short way through a layer is made of: channel sums, prepared products."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sparse_kernels.backends.cpu.lists import lists_of
from sparse_kernels.pattern import SparsityPattern

native = pytest.importorskip("sparse_kernels._native", reason="the native module is not built")


@pytest.fixture(params=native.supported_isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


@pytest.mark.parametrize(
    "channels, count", [(1, 1), (3, 0), (5, 7), (7, 64), (2, 4097), (33, 5000)]
)
def test_channel_sums(channels: int, count: int) -> None:
    source = torch.randn(channels, count)
    results = []
    for threads in (1, 3):
        sums = torch.full((channels,), float("nan"))
        native.channel_sums(sums.data_ptr(), source.data_ptr(), channels, count, threads)
        results.append(sums)
    expected = source.double().sum(1)
    torch.testing.assert_close(results[0].double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(*results)


def test_channel_sums_refuse_null_and_negative_sizes() -> None:
    source = torch.ones(4)
    with pytest.raises(ValueError, match="src must not be null, expected the address of 4"):
        native.channel_sums(source.data_ptr(), 0, 2, 2, 1)
    with pytest.raises(ValueError, match="count must be at least 0, got -1"):
        native.channel_sums(source.data_ptr(), source.data_ptr(), 2, -1, 1)


def _prepared(pattern: SparsityPattern, index: list[int] | None = None) -> object:
    tensors = pattern.tensors()
    crow, col, t_crow, t_row, t_perm = tensors
    rows, cols = pattern.shape
    geometry = [1, 1, 1, 1, 1, rows, cols, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1]
    lists = lists_of(col, crow), lists_of(t_row, t_crow, t_perm)
    at = [t.data_ptr() for t in tensors] if index is None else index
    return native.PreparedProduct(at, geometry, True, *pattern.block, pattern.capacity, *lists)


def test_a_prepared_product_writes_what_is_wanted_and_refuses_what_is_wrong() -> None:
    pattern = SparsityPattern.random((9, 11), density=0.4)
    product = _prepared(pattern)
    values = torch.randn(pattern.capacity, 1, 1)
    x, grad = torch.randn(11, 5), torch.randn(9, 5)  # features first, as in memory
    y, dx, dv, db = (torch.full(s, float("nan")) for s in ((9, 5), (11, 5), values.shape, (9,)))
    product.forward(y.data_ptr(), x.data_ptr(), values.data_ptr(), 0, 5, 2)
    weight = pattern.expand(values)
    torch.testing.assert_close(y, weight @ x, rtol=1e-5, atol=1e-5)
    pointers = grad.data_ptr(), x.data_ptr(), values.data_ptr()
    product.backward(dx.data_ptr(), 0, 0, *pointers, 5, 2)
    torch.testing.assert_close(dx, weight.t() @ grad, rtol=1e-5, atol=1e-5)
    assert dv.isnan().all() and db.isnan().all()
    product.backward(0, dv.data_ptr(), db.data_ptr(), *pointers, 5, 2)
    torch.testing.assert_close(pattern.expand(dv), (grad @ x.t()) * pattern.mask())
    torch.testing.assert_close(db, grad.sum(1))
    with pytest.raises(ValueError, match="grad must not be null"):
        product.backward(dx.data_ptr(), 0, 0, 0, *pointers[1:], 5, 2)
    with pytest.raises(ValueError, match="threads must be between 1 and 4096"):
        product.forward(y.data_ptr(), x.data_ptr(), values.data_ptr(), 0, 5, 0)
    with pytest.raises(ValueError, match="five addresses"):
        _prepared(pattern, [1, 2])
    with pytest.raises(ValueError, match="t_perm must not be null"):
        _prepared(pattern, [t.data_ptr() for t in pattern.tensors()[:4]] + [0])
