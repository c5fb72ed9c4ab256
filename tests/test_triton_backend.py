"""The Triton backend's rules and reasons; needs neither triton nor a GPU."""

from __future__ import annotations

import itertools
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparse_kernels import plan
from sparse_kernels.backends import triton as backend
from sparse_kernels.backends.triton import block_config as tiles

OPERATORS = [
    kind + direction
    for kind, direction in itertools.product(("linear", "conv2d"), ("", "_dgrad", "_wgrad"))
]
PRECISIONS = [
    (torch.bfloat16, False),
    (torch.float16, False),
    (torch.float32, True),
    (torch.float32, False),
]
SIDES = (16, 24, 32, 48, 64, 100, 128)
POINTS = (1, 5, 40, 100, 1 << 20)


def problems() -> list[tiles.Problem]:
    return [
        tiles.Problem(op, dtype, (bh, bw), points, tf32)
        for op in OPERATORS
        for dtype, tf32 in PRECISIONS
        for bh, bw in itertools.product(SIDES, SIDES)
        for points in POINTS
    ]


def test_every_problem_has_two_to_six_candidates_and_one_default() -> None:
    for problem in problems():
        found = tiles.candidates(problem)
        assert 2 <= len(found) <= 6, problem
        assert len(set(found)) == len(found), problem
        default: Any = tiles.default_wgrad if tiles.is_wgrad(problem) else tiles.default_product
        assert default(problem) == found[0], problem


def test_small_problems_get_more_and_smaller_tiles() -> None:
    """64 block rows and a batch of 128: tiles of 128 would use 64 of 132 multiprocessors."""
    large = tiles.Problem("linear", torch.bfloat16, (64, 64), 128)
    assert tiles.default_product(large).tile_m == 128
    assert tiles.default_product(large._replace(lists=64)).tile_m == 32
    assert tiles.default_product(large._replace(lists=70)).tile_m == 64
    assert tiles.default_product(large._replace(points=5, lists=1)).tile_m == 16


def test_tiles_are_powers_of_two_that_the_tensor_cores_take() -> None:
    for problem in problems():
        for config in tiles.candidates(problem):
            powers = [config.tile_m, config.num_warps]
            powers.append(config.per if isinstance(config, tiles.WgradConfig) else config.tile_k)
            assert all(n & (n - 1) == 0 for n in powers), (problem, config)
            assert config.tile_m >= 16
            if isinstance(config, tiles.ProductConfig):
                # Two parts of a block would need two list items ahead: a pair is of whole blocks.
                whole = config.tile_k >= tiles.sides(problem)[1]
                assert config.tile_k >= 16 and (whole or not config.paired)


def test_the_stages_fit_into_the_smallest_chip() -> None:
    for problem in problems():
        size, limit = problem.dtype.itemsize, min(tiles.SHARED_LIMIT.values())
        for config in tiles.candidates(problem):
            if isinstance(config, tiles.WgradConfig):
                bh, bw = (tiles.next_power(side) for side in problem.block)
                bytes_ = (bh + bw * config.per) * config.tile_m * size * config.num_stages
            else:
                n = tiles.sides(problem)[0]
                bytes_ = (config.tile_m + n) * config.tile_k * size * config.num_stages
                bytes_ *= 2 if config.paired else 1
            assert bytes_ <= limit, (problem, config)


@pytest.mark.parametrize("points", [1, 100, 5000, 1 << 20])
@pytest.mark.parametrize("capacity", [1, 30, 4000, 10**6])
def test_parts_of_a_weight_gradient(capacity: int, points: int) -> None:
    problem = tiles.Problem("conv2d_wgrad", torch.bfloat16, (32, 32), points)
    config = tiles.default_wgrad(problem)
    parts = tiles.wgrad_parts(problem, config, capacity, 16)
    assert 1 <= parts <= 64
    assert parts == 1 or parts * capacity * 32 * 32 * 4 <= 64 * 2**20
    assert parts == 1 or points >= 4 * parts * config.tile_m
    if (capacity, points) == (30, 1 << 20):
        assert parts > 10, "few blocks and many pixels: the pixels must be split"


def test_supports_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 32)
    values = torch.zeros(3, 16, 32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "serves CUDA tensors" in str(backend.supports("linear", x, values))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backend, "installed", lambda: False)
    assert "triton is not installed" in str(backend.supports("linear", x, values))
    monkeypatch.setattr(backend, "installed", lambda: True)
    assert backend.supports("linear", x, values) is None
    assert "has kernels for" in str(backend.supports("max_pool2d", x))
    assert "computes float32, bfloat16" in str(backend.supports("linear", x.double(), values))
    for block in ((8, 16), (16, 8), (1, 1), (256, 16)):
        reason = str(backend.supports("linear", x, torch.zeros(1, *block)))
        assert "16 to 128" in reason and str(block) in reason
    assert backend.supports("linear", x, torch.zeros(1, 128, 24)) is None


@pytest.mark.parametrize("block, served", [((16, 16), True), ((64, 128), True), ((1, 1), False)])
def test_tensors_of_a_gpu_are_served(
    monkeypatch: pytest.MonkeyPatch, block: tuple[int, int], served: bool
) -> None:
    """The device is faked: what decides is device, dtype and block, no GPU and no nvcc."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend, "installed", lambda: True)
    x: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    for op in OPERATORS:
        reason = backend.supports(op, x, torch.zeros(1, *block))
        assert (reason is None) == served, reason


def test_plan_gives_blocks_on_a_gpu_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the native CUDA kernels do not serve: a GPU without nvcc is served by Triton alone."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(plan, "_forced", None)
    monkeypatch.setattr(plan, "_cache", {})  # the fake device must not stay in the real one
    monkeypatch.setattr(backend, "installed", lambda: True)
    x: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    blocks, elements = torch.zeros(1, 32, 16), torch.zeros(1, 1, 1)
    for op in OPERATORS:
        values = None if op.endswith("_wgrad") else blocks
        assert plan.choose(op, x, values) is plan.BACKENDS["triton"]
    with pytest.raises(plan.BackendError, match=r"triton: serves blocks .* got \(1, 1\)"):
        plan.choose("conv2d", x, elements)
    monkeypatch.setattr(plan, "_cache", {})
    monkeypatch.setattr(backend, "installed", lambda: False)
    with pytest.raises(plan.BackendError, match="triton: triton is not installed"):
        plan.choose("conv2d", x, blocks)
    cpu: Any = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    assert "serves CUDA tensors" in str(plan.reasons("linear", cpu, blocks)["triton"])


def test_the_package_imports_neither_triton_nor_its_kernels() -> None:
    """Triton is optional, and importing it takes a second: only a call of an operator does."""
    code = (
        "import sys, sparse_kernels, sparse_kernels.backends.triton as backend\n"
        "from sparse_kernels.backends.triton import block_config\n"
        "assert backend.supports('linear', __import__('torch').zeros(1, 16)) is not None\n"
        "loaded = [name for name in sys.modules if '.backends.triton.kernels' in name]\n"
        "assert loaded == [], loaded\n"
    )
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr


def test_float32_precision_follows_torch() -> None:
    """linear the flag of cuda.matmul, conv2d that of cudnn, old names and new ones."""
    from sparse_kernels.backends.triton.operands import allows_tf32

    backends: Any = torch.backends
    before = backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision
    try:
        for matmul, conv in (("tf32", "ieee"), ("ieee", "tf32")):
            backends.cuda.matmul.fp32_precision = matmul
            backends.cudnn.conv.fp32_precision = conv
            assert allows_tf32("linear_wgrad") == (matmul == "tf32")
            assert allows_tf32("conv2d_dgrad") == (conv == "tf32")
    finally:
        backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision = before


def test_lists_of_rows_by_length() -> None:
    """Stable: rows of one length stay in their order; inference tensors are sorted each time."""
    from sparse_kernels.backends.triton.operands import row_order

    pointer = torch.tensor([0, 2, 2, 5, 7], dtype=torch.int32)
    assert row_order(pointer, "test", pointer.diff).tolist() == [2, 0, 3, 1]
    with torch.inference_mode():
        frozen = pointer.clone()
    assert row_order(frozen, "test", frozen.diff).tolist() == [2, 0, 3, 1]


def test_the_longest_lists_of_an_input_gradient_come_first() -> None:
    """Lists by (phase, input block), summed over the taps of the phase; needs no kernel."""
    pytest.importorskip("triton.language", reason="the launchers import the kernels")
    from sparse_kernels.backends.triton import block_products
    from sparse_kernels.geometry import Conv2dGeometry

    g = Conv2dGeometry(64, 32, 2, 2, 2, 2)  # four taps, one per phase; two input blocks of 16
    counts = torch.tensor([[1, 2], [0, 4], [3, 3], [0, 1]])
    t_crow = torch.cat([torch.zeros(1, dtype=torch.int64), counts.flatten().cumsum(0)])
    lengths = block_products.list_lengths(t_crow.int(), g, 2)
    assert lengths.tolist() == counts.flatten().tolist()
