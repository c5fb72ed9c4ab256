"""Native memory kept between calls: lists of a pattern, and the pool of activations."""

from __future__ import annotations

import copy
import gc
import io
import threading

import pytest
import torch

from sparse_kernels import SparseConv2d, SparseLinear, ops
from sparse_kernels._load import native
from sparse_kernels.backends.cpu import memory
from sparse_kernels.backends.cpu.lists import lists_of
from sparse_kernels.geometry import Conv2dGeometry
from sparse_kernels.pattern import SparsityPattern

# Element and column blocks of a linear layer need no lists; these do.
LISTED = (1, 2)


def _product(pattern: SparsityPattern, values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    y = ops.linear(x, values, *pattern.tensors(), out_features=pattern.shape[0])
    return y


def test_lists_are_kept_while_the_index_is_unchanged() -> None:
    pattern = SparsityPattern.random((40, 50), density=0.2, block=LISTED)
    first = lists_of(pattern.col_indices, pattern.crow_indices)
    assert lists_of(pattern.col_indices, pattern.crow_indices) is first
    values = torch.randn(pattern.capacity, *LISTED)
    _product(pattern, values, torch.randn(16, 50))
    held = first.bytes
    assert held > 0 and native().list_cache_bytes() >= held
    _product(pattern, values, torch.randn(16, 50))
    assert first.bytes == held, "a second product of the same shape needs no new lists"
    _product(pattern, values, torch.randn(48, 50))
    assert first.bytes > held, "another batch is cut in another way"


@pytest.mark.parametrize("block", [(1, 1), (4, 1), (2, 3)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_kept_lists_give_the_weight_gradient_of_fresh_ones(
    block: tuple[int, int], kernel: int
) -> None:
    """Bit for bit, at the first and at later calls, whatever was computed in between."""
    pad = kernel // 2
    g = Conv2dGeometry(16, 20, kernel, kernel, 1, 1, pad, pad, pad, pad)
    pattern = SparsityPattern.random(
        g.matrix_shape, density=0.2, block=block, col_parts=kernel * kernel
    )
    crow, col = pattern.crow_indices, pattern.col_indices
    cache = native().ListCache()
    for batch, size in ((24, 6), (8, 5), (24, 6), (24, 6)):
        x, grad = torch.randn(20, size, size, batch), torch.randn(16, size, size, batch)
        geometry = [batch, size, size, size, size, *g]
        made = []
        for lists in (None, cache):
            dv = torch.full((pattern.capacity, *block), float("nan"))
            arrays = (t.data_ptr() for t in (dv, grad, x, crow, col))
            native().conv2d_wgrad(*arrays, geometry, *block, pattern.capacity, 2, lists)
            made.append(dv)
        assert torch.equal(*made) and made[0].abs().sum() > 0
        held = cache.bytes
    assert held > 0, "lists were kept"


def test_ever_new_batches_do_not_grow_the_lists_for_ever() -> None:
    pattern = SparsityPattern.random((24, 32), density=0.3, block=LISTED)
    cache = lists_of(pattern.col_indices, pattern.crow_indices)
    values = torch.randn(pattern.capacity, *LISTED)
    sizes = []
    for batch in range(1, 41):
        x = torch.randn(batch, 32)
        expected = x @ pattern.expand(values).t()
        torch.testing.assert_close(_product(pattern, values, x), expected, rtol=1e-4, atol=1e-4)
        sizes.append(cache.bytes)
    assert sizes[0] < sizes[20] and sizes[-1] == sizes[-2] == sizes[35]


@pytest.mark.parametrize("array", range(5))
def test_writing_an_index_drops_the_lists(array: int) -> None:
    """Every array of a pattern is watched by the direction that reads it."""
    pattern = SparsityPattern.random((40, 50), density=0.2)
    crow, col, t_crow, t_row, t_perm = pattern.tensors()
    before = lists_of(col, crow), lists_of(t_row, t_crow, t_perm)
    written = pattern.tensors()[array]
    written.copy_(written.clone())
    after = lists_of(col, crow), lists_of(t_row, t_crow, t_perm)
    assert (after[0] is before[0]) == (array >= 2)
    assert (after[1] is before[1]) == (array < 2)


def test_products_follow_a_rewritten_pattern() -> None:
    generator = torch.Generator().manual_seed(3)
    geometry = Conv2dGeometry(12, 10, 3, 3, 1, 1, 1, 1, 1, 1)
    pattern = SparsityPattern.random(
        geometry.matrix_shape, density=0.3, col_parts=9, generator=generator
    )
    x = torch.randn(16, 10, 6, 6, generator=generator)
    for _ in range(3):
        values = torch.randn(pattern.capacity, 1, 1, generator=generator)
        values[pattern.nnzb :] = 0
        image, weights = x.clone().requires_grad_(), values.clone().requires_grad_()
        y = ops.conv2d(image, weights, *pattern.tensors(), geometry=geometry)
        dense = pattern.expand(values).reshape(12, 3, 3, 10).permute(0, 3, 1, 2)
        copy_x = x.clone().requires_grad_()
        expected = torch.nn.functional.conv2d(copy_x, dense, padding=1)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        y.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(image.grad, copy_x.grad, rtol=1e-4, atol=1e-4)
        keys = torch.randperm(12 * 90, generator=generator)[: pattern.nnzb].sort().values
        assert not pattern.rewrite_(keys), "it fits, so the tensors stay and are written in place"


def test_lists_die_with_the_pattern_and_do_not_travel() -> None:
    gc.collect()
    before = native().list_cache_bytes()
    layer = SparseLinear(64, 64, density=0.2, block=LISTED)
    layer(torch.randn(16, 64)).sum().backward()
    held = native().list_cache_bytes()
    assert held > before
    other = copy.deepcopy(layer)
    torch.save(layer, io.BytesIO())
    assert native().list_cache_bytes() == held
    x = torch.randn(16, 64)
    torch.testing.assert_close(other(x), layer(x))
    del layer, other
    gc.collect()
    assert native().list_cache_bytes() == before


def test_inference_tensors_are_served_without_lists() -> None:
    with torch.inference_mode():
        layer = SparseConv2d(8, 8, 3, density=0.3)
        assert lists_of(layer.col_indices, layer.crow_indices) is None
        x = torch.randn(4, 8, 6, 6)
        torch.testing.assert_close(layer(x), layer.to_dense()(x), rtol=1e-4, atol=1e-4)


def test_threads_share_the_lists() -> None:
    pattern = SparsityPattern.random((128, 128), density=0.2, block=LISTED)
    values, x = torch.randn(pattern.capacity, *LISTED), torch.randn(64, 128)
    expected = _product(pattern, values, x)
    pattern.col_indices.copy_(pattern.col_indices.clone())
    results: list[torch.Tensor] = []
    threads = [
        threading.Thread(target=lambda: results.append(_product(pattern, values, x)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    for result in results:
        assert torch.equal(result, expected)


FLOATS = memory.POOLED_FROM  # four times the smallest pooled size


def test_pooled_memory_is_used_again() -> None:
    memory.release()
    live = native().pooled_live()
    first = memory.empty_strided((FLOATS,), (1,), FLOATS)
    address = first.data_ptr()
    assert native().pooled_live() >= live + 4 * FLOATS
    view = first[: FLOATS // 2]
    del first
    assert native().pooled_live() > live, "a view keeps the memory"
    del view
    assert native().pooled_live() == live
    assert memory.empty_strided((FLOATS,), (1,), FLOATS).data_ptr() == address


def test_autograd_sums_gradients_from_the_pool_in_place() -> None:
    """A residual sum's backward pass: the first gradient's memory receives the second."""
    made = []

    class Pooled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
            out = memory.empty_strided(grad.shape, (1,), FLOATS).copy_(grad)
            made.append(out.data_ptr())
            return out

    summed = []
    hidden = torch.ones(FLOATS, requires_grad=True) * 1
    hidden.register_hook(lambda grad: summed.append((grad.data_ptr(), grad.unique().tolist())))
    (Pooled.apply(hidden) + Pooled.apply(hidden)).sum().backward()
    assert len(set(made)) == 2 and summed == [(made[0], [2.0])]


def test_pool_holds_no_more_than_was_ever_in_use() -> None:
    memory.release()
    base = native().pooled_bytes()
    peak = 0
    for size in (8, 1, 5, 3, 8, 2, 13, 1):
        tensors = [memory.empty_strided((size * FLOATS,), (1,), size * FLOATS) for _ in range(2)]
        peak = max(peak, native().pooled_live() - base)
        del tensors
        assert native().pooled_bytes() - base <= peak
    memory.release()
    assert native().pooled_bytes() == native().pooled_live()


def test_pooled_output_may_be_written_in_place() -> None:
    """As torch's own outputs: not a view that autograd would refuse to see changed."""
    layer = SparseConv2d(16, 64, 3, padding=1, density=0.3)
    y = layer(torch.randn(16, 16, 32, 32))
    assert y.numel() * 4 >= memory.POOLED_FROM and not y._is_view()
    torch.nn.functional.relu_(y).sum().backward()
    assert layer.values.grad is not None and layer.values.grad.abs().sum() > 0


def test_the_account_of_memory_counts_kept_lists() -> None:
    from sparse_kernels.workbench import account

    layer = SparseLinear(64, 64, density=0.2, block=LISTED)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = account.memory(layer, optimizer)["indices"]
    layer(torch.randn(16, 64, requires_grad=True)).sum().backward()
    added = account.memory(layer, optimizer)["indices"] - before
    caches = (
        lists_of(layer.col_indices, layer.crow_indices),
        lists_of(layer.t_row, layer.t_crow, layer.t_perm),
    )
    assert added == sum(cache.bytes for cache in caches) > 0
