"""The block kernels compiled for real chips, without a GPU: no spills, memory that fits, and the
instructions that are claimed. The slow tests compile everything; `compile_table.py` keeps a journal
of the same and writes it into docs/gpu-compile.md.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compile_table import (
    ARCHITECTURES,
    BLOCKS,
    OPERATORS,
    PRECISIONS,
    Case,
    compile_case,
    every_case,
    launch_of,
)
from interpreter_support import INTERPRETING
from machine_code import compile_launch
from vector_compile import SIDES

from sparse_kernels.backends import triton as backend
from sparse_kernels.geometry import Conv2dGeometry

pytestmark = [
    pytest.mark.skipif(not backend.installed(), reason="triton is not installed"),
    pytest.mark.skipif(INTERPRETING, reason="interpreted kernels cannot be compiled"),
    # Triton announces defaults of its next version.
    pytest.mark.filterwarnings("ignore::UserWarning:triton"),
]

ALL = every_case()
#: One per operator, each with another chip or precision.
CORE = (
    "conv2d bf16 64x64 128-64-0-8-3 sm_90 even",
    "conv2d_dgrad tf32 32x32 128-32-0-4-3 sm_80 even",
    "conv2d_wgrad bf16 16x16 64-8-4-3 sm_100 even",
    "conv2d fp32 128x128 64-16-0-8-3 sm_80 even",
    "conv2d fp32 1x1 512-4-0-4-1 sm_80 even",
    "conv2d bf16 16x1 128-32-1-4-3 sm_90 even",
    "conv2d_dgrad bf16 4x1 512-4-0-4-1 sm_100 even",
    "conv2d bf16 1x1 32-4-0-1-1 sm_100 even",  # by Triton 3.9 all products in FHFMA
    "conv2d_wgrad tf32 16x1 64-64-1-4-3 sm_90 even",
)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.key, marks=() if case.key in CORE else pytest.mark.slow)
        for case in ALL
    ],
)
def test_compiles_without_faults(case: Case) -> None:
    assert compile_case(case)["faults"] == []


def test_the_core_cases_exist() -> None:
    assert set(CORE) <= {case.key for case in ALL}


def test_a_tile_that_is_too_large_is_found() -> None:
    """The check of spills can fail: a thread has no room for 256 sums and their operands."""
    case = Case("conv2d", "fp32", (128, 128), (256, 32, 0, 4, 2), 80)
    assert any("local memory" in fault for fault in compile_case(case)["faults"])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_small_kernels_compile(arch: int) -> None:
    """The lists of the input gradient, with and without groups, the sum over parts, dropout."""
    from sparse_kernels.backends.triton import block_products, block_wgrad, noise

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for groups in (1, 4):
        g = Conv2dGeometry(512, 512, 3, 3, 2, 2, 1, 1, 1, 1, groups=groups)
        index = (empty(17), empty(500), empty(9 * 16 // groups + 1), empty(500), empty(500))
        _, launch = block_products.transposed_lists(index, g, (32, 32))
        assert launch is not None
        found = compile_launch(launch, arch)
        assert (found["spills"], found["local"]) == (0, 0)
    out = empty(500, 32, 32, dtype=torch.float32)
    parts = empty(5, 500, 32, 32, dtype=torch.float32)
    found = compile_launch(block_wgrad.sum_launch(out, parts, index[0]), arch)
    assert (found["spills"], found["local"]) == (0, 0)
    for dtype in (torch.float32, torch.bfloat16):
        x, y = empty(10**6, dtype=dtype), empty(10**6, dtype=dtype)
        launch = noise.launch(y, x, empty(dtype=torch.int64), 0.3)
        assert set(launch.arguments) == set(launch.kernel.arg_names)
        found = compile_launch(launch, arch)
        assert (found["spills"], found["local"], found["scratch"]) == (0, 0, 0)


@pytest.mark.parametrize(
    "start", ["conv2d bf16 64x64", "conv2d_wgrad bf16 64x64", "conv2d_dgrad fp32 4x1"]
)
def test_the_variant_for_large_tensors_compiles(start: str) -> None:
    """64-bit offsets take more registers."""
    case = next(case for case in ALL if case.key.startswith(start))
    launch = launch_of(case)
    launch.arguments["LONG"] = True
    found = compile_launch(launch, 80)
    assert (found["spills"], found["local"]) == (0, 0)


def test_a_launch_names_every_parameter() -> None:
    """What the launcher passes is what the kernel takes, no more and no less."""
    ops = ("conv2d", "linear", "linear_dgrad", "linear_wgrad", "conv2d_dgrad")
    starts = [f"{op} bf16 {block}" for op in ops for block in ("16x16", "1x1", "16x1")]
    for start in starts:
        launch = launch_of(next(case for case in ALL if case.key.startswith(start)))
        assert set(launch.arguments) == set(launch.kernel.arg_names)


def choices(op: str, precision: str, block: tuple[int, int]) -> set[tuple[Any, ...]]:
    """What may be chosen for a class, whatever the number of points and of block rows."""
    from sparse_kernels.backends.triton import block_config, vector_config

    dtype, tf32 = PRECISIONS[precision]
    found: set[tuple[Any, ...]] = set()
    for points in (1, 16, 17, 33, 40, 65, 100, 129, 200, 257, 400, 513, 1000, 1 << 17):
        for lists in (1, 4, 9, 17, 30, 60, 130, 200, 300, 1 << 20):
            p = block_config.Problem(op, dtype, block, points, tf32, lists)
            if block[1] > 1:
                found.update(map(tuple, block_config.candidates(p)))
            else:
                vectors = vector_config.vector_candidates(p)
                found.update(tuple(c) for c in vectors if c.dot or precision != "tf32")
    return found


def test_every_choice_is_compiled_and_nothing_else() -> None:
    """The list above has the choices for all three chips, and no case that nothing chooses.

    Operators of linear layers have the kernels of convolutions, float16 those of bfloat16, plain
    products in TF32 those of strict float32.
    """
    precisions = ("bf16", "tf32", "fp32")
    chips: dict[tuple[Any, ...], set[int]] = {}
    for case in ALL:
        if case.op in OPERATORS[:3] and case.precision in precisions and case.shape == "even":
            chips.setdefault(case[:4], set()).add(case.arch)
    assert all(found == set(ARCHITECTURES) for found in chips.values())
    expected = {
        (op, precision, block, config)
        for op in OPERATORS[:3]
        for precision in precisions
        for block in (*BLOCKS, *((side, 1) for side in SIDES))
        for config in choices(op, precision, block)
    }
    assert set(chips) == expected
