"""What the launchers refuse, and what the bindings check, without a launch."""

from __future__ import annotations

import pytest
import torch
from emulator import load
from problems import compute, make, small_cases


def call(kernel: str = "product", geometry: list[int] | None = None, bh: int = 1, device: int = 0):  # type: ignore[no-untyped-def]
    geometry = geometry or [7, 5, 3]
    if kernel == "product":
        return load().cuda_product(
            "linear", 64, 64, 64, 0, 64, 64, geometry, bh, False, 0, 0, device, 0
        )
    return load().cuda_wgrad(
        "linear_wgrad", 64, 64, 64, 64, 64, 0, 0, geometry, bh, 9, 0, device, 0
    )


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(
        RuntimeError,
        match=r"^linear \(rows 7, cols 5, batch 3, block 1x1, float32, "
        r"device 99\): cudaSetDevice failed: invalid device ordinal",
    ):
        call(device=99)


@pytest.mark.parametrize("bh", [0, 33])
def test_a_block_height_without_kernel_is_refused(bh: int) -> None:
    with pytest.raises(ValueError, match="expected a block height of 1 to 32"):
        call(bh=bh)


def test_more_points_than_32_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="fewer than 2.31 - 1024 pixels x batch"):
        call(geometry=[7, 5, 2**31])


def test_a_workspace_that_is_too_small_is_refused() -> None:
    assert load().cuda_wgrad_workspace([7, 5, 4097], 1, 9) == 3 * 9 * 4
    assert load().cuda_wgrad_workspace([7, 5, 2048], 1, 9) == 0
    with pytest.raises(ValueError, match="workspace of at least 108 bytes .*, got 0"):
        call("wgrad", geometry=[7, 5, 4097])


@pytest.mark.parametrize("bh", [1, 4, 8, 16, 32])
@pytest.mark.parametrize("capacity", [1, 100, 5000, 30000, 500000])
def test_the_workspace_is_no_more_than_a_gpu_needs(capacity: int, bh: int) -> None:
    copy = capacity * bh * 4
    wanted = load().cuda_wgrad_workspace([4096, 4096, 2**20], bh, capacity)
    assert wanted % copy == 0
    assert wanted <= copy + 600_000
    assert load().cuda_wgrad_workspace([4096, 4096, 2**20], bh, 1) == 64 * bh * 4


def image(batch: int, stride: int = 1, groups: int = 1) -> list[int]:
    """4 x 4 pixels, 8 channels, 3 x 3 taps."""
    out = (4 - 1) // stride + 1
    return [batch, 4, 4, out, out, 8, 8, 3, 3, stride, stride, 1, 1, 1, 1, 1, 1, groups]


@pytest.mark.parametrize(
    ("geometry", "bh", "x"),
    [
        (image(8, groups=2), 1, 64),
        (image(6), 1, 64),
        ([64, 64, 8], 17, 64),
        ([64, 64, 7], 1, 64),
        ([64, 64, 8], 1, 68),
    ],
    ids=["groups", "odd images", "tall blocks", "odd batch", "misaligned"],
)
def test_what_the_staged_kernel_does_not_serve(geometry: list[int], bh: int, x: int) -> None:
    with pytest.raises(ValueError, match="for the staged kernel"):
        load().cuda_product("linear", 64, x, 64, 0, 64, 64, geometry, bh, False, 2, 0, 0, 0)


@pytest.mark.parametrize(
    ("geometry", "grad"),
    [(image(8, groups=2), 64), (image(8, stride=2), 64), (image(6), 64), (image(8), 68)],
    ids=["groups", "stride", "odd images", "misaligned"],
)
def test_what_the_staged_input_gradient_does_not_serve(geometry: list[int], grad: int) -> None:
    with pytest.raises(ValueError, match="for the staged kernel"):
        load().cuda_dgrad("dgrad", 64, grad, 64, 64, 64, 64, geometry, 1, 0, 0, 0, 2)


def test_a_device_that_cannot_run_the_kernels_is_known() -> None:
    module = load()
    assert module.cuda_unusable(0) == module.cuda_unusable(1) == ""
    assert module.cuda_unusable(7).startswith("CUDA kernels on device 7: cudaSetDevice failed")
    module.set_compiled(False)
    try:
        assert "no kernel image is available" in module.cuda_unusable(0)
    finally:
        module.set_compiled(True)
    assert module.cuda_unusable(0) == ""
    assert module.current_device() == 0


def test_a_geometry_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="geom must be the 18 integers"):
        call(geometry=[1, 2, 3, 4])


def test_the_callers_device_stays_current() -> None:
    p = make(next(c for c in small_cases() if c.id == "relu"), torch.float32)
    before = load().current_device()
    compute(p, "product", device=1)
    assert load().current_device() == before == 0
