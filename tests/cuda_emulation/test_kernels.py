"""Every CUDA kernel under emulation against the float64 reference: a few of each kind in CI, the
whole table in `make test-full` (mark `slow`).
"""

from __future__ import annotations

import pytest
import torch
from emulator import load, small_grids
from problems import (
    DTYPES,
    KERNELS,
    SMALL,
    Case,
    all_cases,
    bound,
    check,
    compute,
    describe,
    expected,
    has,
    make,
    relative_error,
    run,
    small_cases,
)

ALL = [
    pytest.param(
        case,
        dtype,
        kernel,
        id=f"{case.id}-{str(dtype)[6:]}-{kernel}",
        marks=[] if case.id in SMALL else [pytest.mark.slow],
    )
    for case in all_cases()
    for dtype in DTYPES
    for kernel in KERNELS
    if has(case, dtype, kernel)
]


@pytest.mark.parametrize(("case", "dtype", "kernel"), ALL)
def test_kernel_matches_float64(case: Case, dtype: torch.dtype, kernel: str) -> None:
    check(case, dtype, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_results_do_not_depend_on_the_order_of_warps(kernel: str) -> None:
    name = "small-b13-batch8" if kernel == "small" else "staged-b5"
    problem = make(next(c for c in small_cases() if c.id == name), torch.float32)
    first = compute(problem, kernel, seed=1)
    for seed in (2, 3):
        assert torch.equal(first, compute(problem, kernel, seed))


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("conv-wide", "product"),
        ("conv-wide", "dgrad"),
        ("staged-wide", "product"),
        ("staged-wide", "staged"),
        ("staged-wide", "dgrad"),
        ("parts-b4", "product"),
        ("parts-b4", "staged"),
        ("parts-b4", "dgrad"),
        ("odd-b1-batch258", "product"),
        ("odd-b1-batch258", "dgrad"),
        ("parts-b4", "staged_dgrad"),
        ("staged-conv-3x3", "staged"),
        ("staged-conv-3x3", "staged_dgrad"),
    ],
)
def test_tiles_beyond_the_grid_are_done_in_turns(name: str, kernel: str) -> None:
    case = next(c for c in all_cases() if c.id == name)
    with small_grids():
        check(case, torch.float32, kernel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    ("kernel", "shifted"),
    [
        ("product", "x"),
        ("product", "out_y"),
        ("product", "values"),
        ("product", "col"),
        ("dgrad", "t_row"),
        ("dgrad", "t_perm"),
        ("dgrad", "grad"),
        ("dgrad", "out_dx"),
        ("wgrad", "grad"),
        ("wgrad", "x"),
    ],
)
def test_misaligned_tensors_are_moved_by_elements(
    kernel: str, shifted: str, dtype: torch.dtype
) -> None:
    problem = make(next(c for c in small_cases() if c.id == "b4-batch132"), dtype)
    got, want = compute(problem, kernel, shifted=shifted), expected(problem, kernel)
    assert relative_error(got, want) <= bound(problem, kernel)


@pytest.mark.parametrize("kernel", ["product", "staged", "direct_dgrad", "staged_dgrad"])
@pytest.mark.parametrize("name", ["staged-conv-1x1", "staged-b5", "staged-wide"])
def test_any_order_of_rows_gives_equal_bits(name: str, kernel: str) -> None:
    problem = make(next(c for c in all_cases() if c.id == name), torch.float32)
    call = describe(problem, kernel, load().cuda_wgrad_workspace)
    crow = problem.t["indices"][0]
    lists = len(crow) - 1 if kernel in ("product", "staged") else problem.t["x"].shape[1]
    answers = []
    for order in (None, torch.arange(lists), torch.randperm(lists)):
        made = call._replace(order=None if order is None else order.to(torch.int32))
        answers.append(run(made, kernel).clone())
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])


@pytest.mark.parametrize(
    "name", ["conv-wide", "small-conv"], ids=["conv-wide-float32", "small-conv-float32"]
)
def test_an_infinite_gradient_does_not_meet_padding(name: str) -> None:
    problem = make(next(c for c in small_cases() if c.id == name), torch.float32)
    clean = compute(problem, "wgrad")
    problem.t["grad"][0, 0, 0, 0] = float("inf")  # a corner: some of its taps are padding
    found = compute(problem, "wgrad")
    rows = problem.t["pattern"].mask()[0].nonzero().flatten()  # stored columns of output channel 0
    assert not bool(torch.isnan(found).any())
    same = (found == clean).flatten(1).all(1)
    # Blocks of other channels, and those of taps that are padding there, are as they were.
    assert int((~same).sum()) < len(rows)
