"""How threads share out the products of a linear layer has no influence on a bit of the result.

Threads take groups of lanes of the batch, and stretches of lines where there are more threads than
groups: the batches here make one group and several, numbers of threads that divide them and not,
and work enough that every thread gets some.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sparse_kernels._load import native
from sparse_kernels.pattern import SparsityPattern

ROWS, COLS, DENSITY = 264, 300, 0.25
THREADS = (2, 3, 4, 7)


@pytest.fixture(params=native().supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native().isa()
    native().set_isa(request.param)
    yield request.param
    native().set_isa(before)


def products(
    pattern: SparsityPattern, values: torch.Tensor, batch: int, threads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y [rows, batch], dx [cols, batch] and the values' gradient, of the same operands always."""
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(COLS, batch, generator=generator)
    grad = torch.randn(ROWS, batch, generator=generator)
    crow, col, t_crow, t_row, t_perm = (t.data_ptr() for t in pattern.tensors())
    y, dx = torch.full_like(grad, float("nan")), torch.full_like(x, float("nan"))
    dvalues = torch.full_like(values, float("nan"))
    shared = (ROWS, COLS, *pattern.block, values.shape[0], batch)
    module, weights = native(), values.data_ptr()
    module.linear(y.data_ptr(), x.data_ptr(), weights, 0, crow, col, *shared, False, threads)
    module.linear_dgrad(
        dx.data_ptr(), grad.data_ptr(), weights, t_crow, t_row, t_perm, *shared, threads
    )
    module.linear_wgrad(
        dvalues.data_ptr(), grad.data_ptr(), x.data_ptr(), crow, col, *shared, threads
    )
    dense = pattern.expand(values.double())
    assert torch.allclose(y.double(), dense @ x.double(), atol=1e-4)
    assert torch.allclose(dx.double(), dense.T @ grad.double(), atol=1e-4)
    assert torch.allclose(
        dvalues.double(), pattern.compress(grad.double() @ x.double().T), atol=1e-4
    )
    return y, dx, dvalues


@pytest.mark.parametrize("block", [(1, 1), (2, 1), (4, 1)], ids=str)
@pytest.mark.parametrize("batch", [24, 60, 96, 130])
def test_shares_of_threads_change_no_bit(isa: str, batch: int, block: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    pattern = SparsityPattern.random(
        (ROWS, COLS), density=DENSITY, block=block, generator=generator
    )
    values = pattern.compress(torch.randn(ROWS, COLS, generator=generator))
    alone = products(pattern, values, batch, 1)
    for threads in THREADS:
        together = products(pattern, values, batch, threads)
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True)), threads
