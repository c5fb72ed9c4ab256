"""Where scaling ends: the model by hand, the bytes by counting, the command."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from small_training import make_model, sparse

from sparse_kernels import cli
from sparse_kernels.workbench.bench import workers
from sparse_kernels.workbench.bench.workers import Load

LOAD = Load("sparse", 64, seconds=0.1, gradient_bytes=9e6, update_bytes=1e6)
FAST = 1e15


def test_the_ring_by_hand() -> None:
    # 2 rounds, each of half of the bytes, at 1 MB/s, and 3 s for each round.
    assert workers.communication(1e6, 2, 1e6, 3.0) == pytest.approx(1.0 + 6.0)
    assert workers.communication(1e6, 1, 1e6, 3.0) == 0.0


def test_ends_by_hand() -> None:
    # Shared batch, 100 MB/s: 0.1 / w against 0.2 (w - 1) / w: equal at w = 1.5.
    assert workers.end_of_scaling(LOAD, 1e8, 0.0, strong=True) == 1
    # 10 GB/s: 0.1 against 0.002 (w - 1): equal at w = 51.
    assert workers.end_of_scaling(LOAD, 1e10, 0.0, strong=True) == 51
    # Own batches: at most 2 * 10 MB / 1 GB/s = 0.02 s, for ever; with latency 1.98 (w - 1) ms.
    assert workers.end_of_scaling(LOAD, 1e9, 0.0, strong=False) == workers.MOST_WORKERS
    assert workers.end_of_scaling(LOAD, FAST, 0.99e-3, strong=False) == 51


@pytest.mark.parametrize("strong", [False, True])
def test_the_end_is_the_last_that_is_good_enough(strong: bool) -> None:
    last = workers.end_of_scaling(LOAD, 3e9, 1e-5, strong=strong)
    good = [workers.efficiency(LOAD, w, 3e9, 1e-5, strong=strong) for w in (last, last + 1)]
    assert good[0] >= 0.5 > good[1]


def test_least_bandwidth_is_enough_and_no_more() -> None:
    found = workers.least_bandwidth(LOAD, 8, 1e-5)
    assert found is not None
    assert workers.efficiency(LOAD, 8, found, 1e-5, strong=False) == pytest.approx(0.8)
    assert workers.least_bandwidth(LOAD, 8, 1.0) is None


def test_bytes_are_those_of_the_parameters() -> None:
    model = make_model((20, 30, 10), density=0.2)
    stored = [layer.pattern.nnzb for layer in sparse(model)]
    assert workers.gradient_bytes(model) == 8 * (sum(stored) + 30 + 10)
    assert workers.update_bytes(model) == 8 * (20 * 30 + 30 * 10) + 8 * sum(stored)


def test_command() -> None:
    words = "bench workers --net lenet-300-100 --batch-size 20 --rounds 3 --bandwidth 1"
    done = CliRunner().invoke(cli.main, words.split())
    assert done.exit_code == 0, done.output
    assert "| sparse" in done.output and "| dense" in done.output
    assert "Gbit/s" in done.output
