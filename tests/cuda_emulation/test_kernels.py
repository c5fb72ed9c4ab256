"""Every CUDA kernel under emulation against the float64 reference: a few of each kind in CI, the
whole table in `make test-full` (mark `slow`).
"""

from __future__ import annotations

import pytest
import torch
from problems import DTYPES, KERNELS, SMALL, Case, all_cases, check, compute, make, small_cases

ALL = [
    pytest.param(c, id=c.id, marks=[] if c.id in SMALL else [pytest.mark.slow]) for c in all_cases()
]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", ALL)
def test_kernel_matches_float64(case: Case, dtype: torch.dtype, kernel: str) -> None:
    check(case, dtype, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_results_do_not_depend_on_the_order_of_warps(kernel: str) -> None:
    problem = make(next(c for c in small_cases() if c.id == "primes-blocks"), torch.float32)
    first = compute(problem, kernel, seed=1)
    for seed in (2, 3):
        assert torch.equal(first, compute(problem, kernel, seed))
