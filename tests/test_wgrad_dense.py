"""The CPU's dense weight gradient: every way of computing it against float64, at odd shapes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import relative_error

from sparse_kernels._load import native
from sparse_kernels.backends import reference
from sparse_kernels.backends.cpu import wgrad_dense
from sparse_kernels.geometry import Conv2dGeometry
from sparse_kernels.layout import to_feature_major

TOLERANCE = 2e-6
WAYS = ("_by_taps", "_by_halves", "_by_bands")
# stride h, w, padding top, left, bottom, right, dilation h, w; kernel; image; batch
SHAPES = {
    "3x3": ((1, 1, 1, 1, 1, 1, 1, 1), (3, 3), (8, 8), 16),
    "odd-batch": ((1, 1, 1, 1, 1, 1, 1, 1), (3, 3), (5, 7), 13),
    "1x1": ((1, 1, 0, 0, 0, 0, 1, 1), (1, 1), (4, 6), 5),
    "1x1-stride": ((2, 3, 0, 0, 0, 0, 1, 1), (1, 1), (5, 8), 4),
    "2x2-image": ((1, 1, 1, 1, 1, 1, 1, 1), (3, 3), (2, 2), 128),
    "1x1-image": ((1, 1, 1, 1, 1, 1, 1, 1), (3, 3), (1, 1), 7),
    "stride-2": ((2, 2, 1, 1, 1, 1, 1, 1), (3, 3), (9, 8), 6),
    "stride-h-only": ((2, 1, 1, 1, 1, 1, 1, 1), (3, 3), (9, 8), 6),
    "stride-3-dilated": ((3, 2, 2, 3, 1, 0, 2, 3), (3, 2), (9, 11), 3),
    "dilated": ((1, 1, 2, 2, 2, 2, 2, 2), (3, 3), (6, 6), 8),
    "one-sided-padding": ((1, 1, 0, 3, 2, 0, 1, 1), (2, 4), (6, 5), 9),
    "padding-beyond-reach": ((1, 1, 4, 4, 4, 4, 1, 1), (3, 3), (2, 3), 3),
    "one-row": ((1, 1, 0, 1, 0, 1, 1, 1), (1, 3), (1, 17), 4),
    "batch-1": ((1, 1, 1, 1, 1, 1, 1, 1), (3, 3), (11, 12), 1),
}


def _problem(name: str, channels: tuple[int, int], groups: int = 1) -> tuple[Any, ...]:
    """(dy, x, geometry) feature-major, skewed so that swapped channels or taps would show."""
    numbers, kernel, image, batch = SHAPES[name]
    geometry = Conv2dGeometry(channels[1], channels[0], *kernel, *numbers, groups)
    generator = torch.Generator().manual_seed(len(name))
    x = torch.randn(batch, channels[0], *image, generator=generator) + 0.5
    size = geometry.output_size(*image)
    dy = torch.randn(batch, channels[1], *size, generator=generator) + 0.25
    return to_feature_major(dy), to_feature_major(x), geometry


def _expected(dy: torch.Tensor, x: torch.Tensor, geometry: Conv2dGeometry) -> torch.Tensor:
    return reference.conv2d_wgrad_dense(dy.double(), x.double(), geometry)


@pytest.fixture
def dirty_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory that would show if it were read: NaN."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty

    def fill(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args, **kwargs: make(*args, **kwargs).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", fill(empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", fill(new_empty))


@pytest.mark.parametrize("band", [500, 1 << 20])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SHAPES)
def test_each_way_at_each_shape(
    name: str, way: str, band: int, monkeypatch: pytest.MonkeyPatch, dirty_memory: None
) -> None:
    monkeypatch.setattr(wgrad_dense, "_BAND", band)
    channels = (17, 40) if band > 500 else (3, 5)
    dy, x, geometry = _problem(name, channels)
    dy_chwn, x_chwn = dy.permute(1, 2, 3, 0), x.permute(1, 2, 3, 0)
    found = getattr(wgrad_dense, way)(geometry, dy_chwn, x_chwn)
    assert found.shape == geometry.matrix_shape and found.is_contiguous()
    assert relative_error(found, _expected(dy, x, geometry)) < TOLERANCE


@pytest.mark.parametrize("band", [1, 3_000, 1 << 20])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("name", SHAPES)
def test_groups_and_bands_of_every_size(
    name: str, groups: int, band: int, monkeypatch: pytest.MonkeyPatch, dirty_memory: None
) -> None:
    """A band of less than a row, of some rows, of the whole image."""
    monkeypatch.setattr(wgrad_dense, "_BAND", band)
    monkeypatch.setattr(wgrad_dense, "_MIN_BAND", 1)
    dy, x, geometry = _problem(name, (12, 18), groups)
    found = wgrad_dense.conv2d_wgrad_dense(dy, x, geometry)
    assert relative_error(found, _expected(dy, x, geometry)) < TOLERANCE


TILES = {  # image, padding top, left, bottom, right, batch, channels
    "even": ((6, 8), (1, 1, 1, 1), 16, (7, 10)),
    "odd-image": ((5, 7), (1, 1, 1, 1), 13, (4, 3)),
    "no-padding": ((6, 7), (0, 0, 0, 0), 24, (1, 1)),
    "one-pixel": ((1, 1), (1, 1, 1, 1), 5, (6, 4)),
    "one-sided-padding": ((4, 3), (3, 0, 0, 2), 9, (2, 5)),
    "padding-beyond-reach": ((2, 3), (4, 4, 4, 4), 3, (3, 13)),
    "batch-1": ((9, 4), (1, 1, 1, 1), 1, (5, 2)),
    "parts-of-the-batch": ((3, 4), (1, 1, 1, 1), 1030, (5, 4)),
    "many-channels": ((3, 4), (1, 1, 1, 1), 8, (200, 90)),
    "several-chunks": ((41, 40), (1, 1, 1, 1), 60, (40, 30)),
}


@pytest.mark.parametrize("isa", native().supported_isas())
@pytest.mark.parametrize("name", TILES)
def test_tiles(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every instruction set, scratch full of NaN, the same bits from one thread and from three."""

    def dirty(shape: Any, strides: Any, floats: int) -> torch.Tensor:
        return torch.full((floats,), float("nan")).as_strided(shape, strides)

    monkeypatch.setattr(wgrad_dense, "empty_strided", dirty)
    image, padding, batch, (c_in, c_out) = TILES[name]
    geometry = Conv2dGeometry(c_out, c_in, 3, 3, 1, 1, *padding)
    x = to_feature_major(torch.randn(batch, c_in, *image) + 0.5)
    dy = torch.randn(batch, c_out, *geometry.output_size(*image)) + 0.25
    dy = to_feature_major(dy)
    threads, chosen = torch.get_num_threads(), native().isa()
    found = []
    try:
        native().set_isa(isa)
        for count in (1, 3):
            torch.set_num_threads(count)
            views = (dy.permute(1, 2, 3, 0), x.permute(1, 2, 3, 0))
            found.append(wgrad_dense._by_tiles(geometry, *views))
    finally:
        torch.set_num_threads(threads)
        native().set_isa(chosen)
    assert torch.equal(*found), "the number of threads changes the sums"
    assert relative_error(found[0], _expected(dy, x, geometry)) < TOLERANCE


def test_tiles_refuse_what_they_cannot_hold() -> None:
    sizes = [2, 3, 4, 5, 5, 1, 1, 5, 5]  # batch, channels out and in, image, padding, output
    needed = native().wgrad_tiles_scratch(*sizes)
    data = torch.full((needed,), float("nan"))
    dw = torch.full((3 * 9 * 4,), 7.0)
    pointers = [dw.data_ptr(), data.data_ptr(), data.data_ptr(), data.data_ptr()]
    with pytest.raises(ValueError, match=f"at least {needed} floats .*, got {needed - 1}"):
        native().wgrad_tiles(*pointers, needed - 1, *sizes, 1)
    with pytest.raises(ValueError, match="threads must be between"):
        native().wgrad_tiles(*pointers, needed, *sizes, 0)
    for i, least in enumerate((1, 1, 1, 1, 1, 0, 0, 1, 1)):
        bad = [*sizes[:i], least - 1, *sizes[i + 1 :]]
        with pytest.raises(ValueError, match=f"must be at least {least}, got {least - 1}"):
            native().wgrad_tiles_scratch(*bad)
    for i in range(4):
        with pytest.raises(ValueError, match="must not be null"):
            native().wgrad_tiles(*pointers[:i], 0, *pointers[i + 1 :], needed, *sizes, 1)
    assert bool((dw == 7.0).all()), "written before the check"


CHOICES = [
    ((64, 64), (6, 16), 32, (3, 3), "_by_tiles"),
    ((64, 64), (6, 16), 32, (1, 1), "_by_halves"),
    ((64, 64), (6, 6), 16, (3, 3), "_by_tiles"),
    ((64, 300), (4, 4), 64, (3, 3), "_by_tiles"),
    ((64, 64), (3, 3), 64, (3, 3), "_by_taps"),  # mostly border
    ((300, 64), (2, 2), 128, (3, 3), "_by_taps"),
    ((260, 48), (9, 33), 16, (1, 1), "_by_taps"),
    ((64, 64), (6, 6), 2, (3, 3), "_by_taps"),  # short runs
    ((3, 64), (6, 6), 32, (3, 3), "_by_bands"),  # few channels
]


@pytest.mark.parametrize("case", CHOICES, ids=str)
def test_the_shape_chooses_the_way(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (c_in, c_out), image, batch, kernel, way = case
    called = []
    for name in (*WAYS, "_by_tiles"):
        inner = getattr(wgrad_dense, name)

        def spy(*args: Any, inner: Any = inner, name: str = name) -> torch.Tensor:
            called.append(name)
            result: torch.Tensor = inner(*args)
            return result

        monkeypatch.setattr(wgrad_dense, name, spy)
    pad = kernel[0] // 2
    geometry = Conv2dGeometry(c_out, c_in, *kernel, 1, 1, pad, pad, pad, pad)
    x = to_feature_major(torch.randn(batch, c_in, *image))
    dy = to_feature_major(torch.randn(batch, c_out, *image))
    found = wgrad_dense.conv2d_wgrad_dense(dy, x, geometry)
    assert called == [way]
    assert relative_error(found, _expected(dy, x, geometry)) < TOLERANCE
    # The same numbers in another order of memory, and in 16 bits.
    again = wgrad_dense.conv2d_wgrad_dense(dy.contiguous(), x.contiguous(), geometry)
    assert torch.equal(again, found), "not deterministic, or the layout changes the sums"
    half = wgrad_dense.conv2d_wgrad_dense(dy.bfloat16(), x.bfloat16(), geometry)
    expected = _expected(dy.bfloat16(), x.bfloat16(), geometry)
    assert half.dtype == torch.float32 and relative_error(half, expected) < TOLERANCE


def test_random_shapes() -> None:
    draw = random.Random(0)
    for _ in range(60):
        groups = draw.choice([1, 1, 2])
        channels = [groups * draw.choice([1, 3, 48, 65]) for _ in range(2)]
        numbers = [draw.choice([1, 1, 2, 3]) for _ in range(2)]
        numbers += [draw.randrange(3) for _ in range(4)] + [draw.choice([1, 1, 2])] * 2
        kernel, image = [[draw.randrange(1, top) for _ in range(2)] for top in (4, 10)]
        geometry = Conv2dGeometry(channels[1], channels[0], *kernel, *numbers, groups)
        size = geometry.output_size(*image)
        if min(size) < 1:
            continue
        batch = draw.choice([1, 2, 15, 64])
        x, dy = torch.randn(batch, channels[0], *image), torch.randn(batch, channels[1], *size)
        found = wgrad_dense.conv2d_wgrad_dense(dy, x, geometry)
        assert relative_error(found, _expected(dy, x, geometry)) < TOLERANCE, (geometry, image)


def test_an_empty_batch_has_no_gradient() -> None:
    geometry = Conv2dGeometry(5, 4, 3, 3)
    found = wgrad_dense.conv2d_wgrad_dense(
        torch.empty(0, 5, 4, 4), torch.empty(0, 4, 6, 6), geometry
    )
    assert torch.equal(found, torch.zeros(5, 36))
    linear = wgrad_dense.linear_wgrad_dense(torch.empty(0, 3), torch.empty(0, 4))
    assert torch.equal(linear, torch.zeros(3, 4))


@pytest.mark.parametrize("layouts", ["ff", "fc", "cf", "cc"])
def test_linear_in_any_layout(layouts: str) -> None:
    grad, x = torch.randn(13, 20) + 0.5, torch.randn(13, 31) + 0.5
    expected = grad.double().t() @ x.double()
    grad = to_feature_major(grad) if layouts[0] == "f" else grad
    x = to_feature_major(x) if layouts[1] == "f" else x
    assert relative_error(wgrad_dense.linear_wgrad_dense(grad, x), expected) < TOLERANCE
