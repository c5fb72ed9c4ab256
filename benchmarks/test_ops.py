"""pytest-benchmark over the operators: sparse and dense rows of one group stand under each other.

make bench                                       every operator of the core layers (minutes)
make bench BENCH_ARGS="--small -k linear"        the small shapes, linear only
For interleaved timings with a machine header and files use `sparse-kernels bench ops`; both take
their operators, checked before they are timed, from sparse_kernels.workbench.bench.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparse_kernels.workbench.bench.ops import Problem


@pytest.mark.parametrize("contender", ["sparse", "contiguous", "channels_last"])
def test_operator(
    benchmark: Any,
    task: Callable[[], Problem | dict[str, Any]],
    contender: str,
    request: pytest.FixtureRequest,
) -> None:
    problem = task()
    if isinstance(problem, dict):
        pytest.skip(problem["why"])
    if contender not in problem.calls:
        pytest.skip("a linear layer has one dense layout")
    if contender != "sparse" and problem.block == "4x1":
        pytest.skip("dense does not depend on the block: timed once, beside 1x1")
    call = problem.calls[contender]
    on_gpu = request.config.getoption("--device").startswith("cuda")

    def timed() -> None:
        call()
        if on_gpu:
            torch.cuda.synchronize()

    benchmark.group = f"{problem.operator} {problem.shape}"
    benchmark.extra_info.update(
        flops=problem.flops,
        dense_flops=problem.dense_flops,
        bytes=problem.bytes,
        errors=problem.errors,
    )
    benchmark(timed)
