"""The tensor-core block kernels under emulation against the float64 reference: a case of each kind
in CI, the whole table in `make test-full` (mark `slow`).
"""

from __future__ import annotations

import pytest
import torch
from emulator import load, small_grids
from mma_problems import CASES, DTYPES, KERNELS, Case, check, compute, is_small, make

ALL = [
    pytest.param(
        case,
        dtype,
        kernel,
        id=f"{case.id}-{str(dtype)[6:]}-{kernel}",
        marks=[] if is_small(case) else [pytest.mark.slow],
    )
    for case in CASES
    for dtype in DTYPES
    for kernel in KERNELS
]


@pytest.mark.parametrize(("case", "dtype", "kernel"), ALL)
def test_kernel_matches_float64(case: Case, dtype: torch.dtype, kernel: str) -> None:
    check(case, dtype, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["b16-parts", "b32-conv-stride2"])
def test_results_do_not_depend_on_the_order_of_warps(name: str, kernel: str) -> None:
    problem = make(next(c for c in CASES if c.id == name), torch.bfloat16)
    assert torch.equal(compute(problem, kernel, seed=1), compute(problem, kernel, seed=2))


@pytest.mark.parametrize("kernel", ["block_product", "block_dgrad"])
def test_tiles_beyond_the_grid_are_done_in_turns(kernel: str) -> None:
    with small_grids():
        check(next(c for c in CASES if c.id == "b16-parts"), torch.bfloat16, kernel)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_infinities_do_not_leak_out_of_partial_blocks(dtype: torch.dtype) -> None:
    # 0 * inf would be NaN in the rows that a partial block does not have.
    problem = make(next(c for c in CASES if c.id == "b16-conv-partial"), dtype)
    problem.t["x"][0, 0] = float("inf")
    there = problem.t["pattern"].compress(torch.ones(problem.t["pattern"].shape))
    assert bool((there == 0).any())
    assert not bool(compute(problem, "block_wgrad")[there == 0].any())


def test_a_long_sum_is_cut_and_the_table_has_such_cases() -> None:
    # 601 points are 10 stages of 64 (bfloat16), or 19 of 32 (TF32): two and four parts.
    workspace = load().cuda_block_wgrad_workspace
    assert workspace([21, 32, 601], 16, 24, 2) == 2 * 24 * 16 * 16 * 4
    assert workspace([21, 32, 601], 16, 24, 0) == 4 * 24 * 16 * 16 * 4
    assert workspace([21, 32, 448], 16, 24, 2) == 0  # 7 stages: under 4 for each of two
    # Many blocks are work enough for a GPU as they are, and their copies would be large.
    assert workspace([4096, 4096, 8192], 16, 60000, 2) == 0


# -- what the launchers refuse ---------------------------------------------------------------------


def product(
    geometry: list[int], block: int = 16, values: int = 64, element: int = 2, device: int = 0
) -> None:
    load().cuda_block_product(
        "linear", 64, 64, values, 0, 64, 64, geometry, block, False, element, device, 0
    )


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(
        RuntimeError,
        match=r"^linear \(rows 7, cols 5, batch 3, block 16x16, bfloat16, device 99\): "
        r"cudaSetDevice failed: invalid device ordinal",
    ):
        product([7, 5, 3], device=99)


@pytest.mark.parametrize("block", [1, 8, 24, 64])
def test_other_blocks_are_refused(block: int) -> None:
    with pytest.raises(ValueError, match="expected blocks of 16 x 16 or 32 x 32"):
        product([7, 5, 3], block)


def test_misaligned_values_are_refused() -> None:
    with pytest.raises(ValueError, match="expected values at a multiple of 16 bytes"):
        product([7, 5, 3], values=72)


def test_more_points_than_32_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="fewer than 2.31 - 65536 pixels x batch"):
        product([7, 5, 2**31])


def test_a_workspace_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="workspace of at least 49152 bytes .*, got 16"):
        load().cuda_block_wgrad(
            "linear_wgrad", 64, 64, 64, 64, 64, 64, 16, [21, 32, 601], 16, 24, 2, 0, 0
        )


def test_the_callers_device_stays_current() -> None:
    problem = make(next(c for c in CASES if c.id == "b16-even"), torch.bfloat16)
    before = load().current_device()
    compute(problem, "block_product", device=1)
    assert load().current_device() == before == 0
