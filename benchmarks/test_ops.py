"""pytest-benchmark over the operators: sparse and dense rows of one group stand under each other.

make bench                                   every shape (minutes)
make bench BENCH_ARGS="--small -k linear"    the small shapes, linear only
For interleaved timings with a machine header use benchmarks/operators.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import BATCH, OPERATORS, SMALL_BATCH, SMALL_SHAPES, LayerShape, make_problem
from timing import wait

BLOCKS = ((1, 1), (2, 1), (4, 1), (8, 1))
CONTENDERS = ("sparse", "dense", "dense channels_last")


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block[0]}x{block[1]}")
@pytest.mark.parametrize("operator", OPERATORS)
def test_operator(
    benchmark: Any,
    shape: LayerShape,
    operator: str,
    block: tuple[int, int],
    contender: str,
    device: torch.device,
) -> None:
    if contender != "sparse" and block != (1, 1):
        pytest.skip("dense does not depend on the block: timed once, beside 1x1")
    batch = SMALL_BATCH if shape in SMALL_SHAPES else BATCH
    problem = make_problem(shape, batch, operator, 0.05, block, device)
    if problem is None:
        pytest.skip(f"the backend of {device} has no {operator} for {shape.name}")
    if contender not in problem.contenders:
        pytest.skip("a linear layer has one dense layout")
    call = problem.contenders[contender]

    def timed() -> None:
        call()
        wait(device)

    benchmark.group = f"{operator} {shape.name}"
    benchmark.extra_info.update(
        density=problem.density,
        flops=problem.flops,
        dense_flops=problem.dense_flops,
        error=problem.error,
    )
    benchmark(timed)
