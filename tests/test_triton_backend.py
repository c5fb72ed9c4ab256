"""The Triton backend's rules and reasons; needs neither triton nor a GPU."""

from __future__ import annotations

import itertools
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_kernels import ops, plan
from sparse_kernels.backends import _cuda_native
from sparse_kernels.backends import triton as backend
from sparse_kernels.backends.triton import block_config as tiles
from sparse_kernels.backends.triton import vector_config
from sparse_kernels.geometry import Conv2dGeometry
from sparse_kernels.layout import is_feature_major

LIB = torch.ops.sparse_kernels
assert ops.OPERATORS  # importing them defines them
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


@pytest.mark.parametrize("side", [1, 2, 3, 8, 16, 32])
def test_element_and_vector_candidates(side: int) -> None:
    """Tensor cores only where there are some and a block fills half of a tile."""
    for op, (dtype, tf32), points in itertools.product(OPERATORS, PRECISIONS, POINTS):
        problem = tiles.Problem(op, dtype, (side, 1), points, tf32)
        found = vector_config.vector_candidates(problem)
        assert 1 <= len(found) <= 4 and len(set(found)) == len(found), problem
        for config in found:
            assert all(n & (n - 1) == 0 for n in config[:2]), config
            assert config.tile_m >= 16
        dots = [config for config in found if config.dot]
        if op.endswith("_dgrad") or (not op.endswith("_wgrad") and side < 8):
            assert dots == []
        if not op.endswith("_wgrad"):
            assert dots == [] or not tiles.strict(problem)


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
    for block in ((8, 16), (16, 8), (1, 2), (33, 1), (256, 16)):
        for reason in (
            str(backend.supports("linear", x, torch.zeros(1, *block))),
            str(backend.supports("linear_wgrad", x, None, block)),
        ):
            assert "16 to 128 and (V, 1) with V up to 32" in reason and str(block) in reason
    for block in ((128, 24), (1, 1), (3, 1), (32, 1)):
        assert backend.supports("linear", x, torch.zeros(1, *block)) is None
        assert backend.supports("linear_wgrad", x, None, block) is None


SERVED = [(16, 16), (64, 128), (1, 1), (4, 1), (32, 1)]
REFUSED = [(8, 16), (1, 4), (64, 1)]


@pytest.fixture
def gpu_without_nvcc(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Tensors of a faked GPU; triton installed, the native module built without CUDA.

    What decides is device, dtype and block, so that neither GPU nor triton is needed.
    """
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(plan, "_forced", None)
    monkeypatch.setattr(plan, "_cache", {})  # the fake device must not stay in the real one
    monkeypatch.setattr(backend, "installed", lambda: True)
    native: Any = SimpleNamespace(build_info=lambda: {"cuda": False, "why_no_cuda": "no nvcc"})
    monkeypatch.setattr(_cuda_native, "native_or_none", lambda: native)

    def tensor(dtype: torch.dtype) -> Any:
        return SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype)

    return tensor


def choice(op: str, x: Any, block: tuple[int, int]) -> Any:
    """What plan chooses for an operator with such blocks, weight gradients included."""
    if op.endswith("_wgrad"):
        return plan.choose(op, x, None, block)
    return plan.choose(op, x, torch.zeros(1, *block))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", SERVED, ids=str)
def test_a_gpu_without_nvcc_is_served_by_triton_alone(
    block: tuple[int, int], dtype: torch.dtype, gpu_without_nvcc: Any
) -> None:
    for op in OPERATORS:
        assert choice(op, gpu_without_nvcc(dtype), block) is plan.BACKENDS["triton"]


@pytest.mark.parametrize("op", OPERATORS)
def test_what_triton_does_not_serve_is_refused_with_reasons(
    op: str, gpu_without_nvcc: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = gpu_without_nvcc(torch.bfloat16)
    for block in REFUSED:
        with pytest.raises(plan.BackendError, match="triton: serves blocks .* got"):
            choice(op, x, block)
    monkeypatch.setattr(plan, "_cache", {})
    monkeypatch.setattr(backend, "installed", lambda: False)
    message = "cuda: (built without CUDA: no nvcc|has no .*); triton: triton is not installed"
    with pytest.raises(plan.BackendError, match=message):
        choice(op, x, (16, 16))
    cpu: Any = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    assert "serves CUDA tensors" in str(plan.reasons(op, cpu, None, (1, 1))["triton"])


@pytest.mark.parametrize("block", [(16, 16), (4, 1)], ids=str)
def test_fake_results_have_the_strides_of_the_backend(
    block: tuple[int, int], gpu_without_nvcc: Any
) -> None:
    """torch.compile relies on them: of blocks batch-major and channels_last, else feature-major."""
    g = Conv2dGeometry(64, 48, 3, 3, 2, 2, 1, 1, 1, 1)
    with FakeTensorMode():
        for spatial in (False, True):
            rows, cols = 64 // block[0], (9 if spatial else 1) * 48 // block[1]
            lengths = (rows + 1, 10, cols + 1, 10, 10)
            index = [torch.empty(n, dtype=torch.int32, device="cuda") for n in lengths]
            values = torch.empty(10, *block, device="cuda")
            x = torch.empty(5, 48, *((9, 7) if spatial else ()), device="cuda")
            grad = torch.empty(5, 64, *((5, 4) if spatial else ()), device="cuda")
            if spatial:
                y = LIB.conv2d(x, values, *index, None, None, list(g), False)
                dx = LIB.conv2d_dgrad(grad, values, *index, 9, 7, list(g))
            else:
                y = LIB.linear(x, values, *index, None, None, 64, False)
                dx = LIB.linear_dgrad(grad, values, *index, 48)
            assert (y.shape, dx.shape) == (grad.shape, x.shape)
            form = torch.channels_last if spatial else torch.contiguous_format
            for out in (y, dx):
                assert out.is_contiguous(memory_format=form) == (block == (16, 16))
                assert is_feature_major(out) == (block == (4, 1))


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


def test_an_order_first_made_in_inference_mode_serves_training() -> None:
    from sparse_kernels.backends.triton.operands import row_order

    pointer = torch.tensor([0, 1, 4, 6])
    with torch.inference_mode():
        first = row_order(pointer, "inference", pointer.diff)
    assert first.tolist() == [1, 2, 0]
    pointer.copy_(torch.tensor([0, 3, 4, 6]))  # a mask update
    assert row_order(pointer, "inference", pointer.diff) is first
    assert first.tolist() == [0, 2, 1]
