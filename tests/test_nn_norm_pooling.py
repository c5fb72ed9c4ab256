"""Layout-keeping norms and poolings against torch's: outputs, gradients, statistics, layouts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_kernels import plan
from sparse_kernels.layout import empty_feature_major, is_feature_major
from sparse_kernels.nn import AvgPool2d, BatchNorm1d, BatchNorm2d, MaxPool2d

NORMS: list[dict[str, Any]] = [
    {},
    {"momentum": None},
    {"momentum": 0.3, "eps": 1e-3},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False, "momentum": None},
]
POOLS: list[tuple[type[nn.Module], type[nn.Module], dict[str, Any]]] = [
    (MaxPool2d, nn.MaxPool2d, {"kernel_size": 2}),
    (MaxPool2d, nn.MaxPool2d, {"kernel_size": (3, 2), "stride": 2, "padding": 1}),
    (MaxPool2d, nn.MaxPool2d, {"kernel_size": 3, "dilation": 2, "ceil_mode": True}),
    (MaxPool2d, nn.MaxPool2d, {"kernel_size": 16, "padding": 5}),
    (AvgPool2d, nn.AvgPool2d, {"kernel_size": 2}),
    (AvgPool2d, nn.AvgPool2d, {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}),
    (AvgPool2d, nn.AvgPool2d, {"kernel_size": 3, "padding": 1, "count_include_pad": False}),
    (AvgPool2d, nn.AvgPool2d, {"kernel_size": (2, 3), "divisor_override": 5}),
]


def image(layout: str, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(4, 3, 9, 10, dtype=dtype)
    if layout == "feature-major":
        return empty_feature_major(x.shape, dtype, x.device).copy_(x)
    return x.contiguous(memory_format=getattr(torch, layout))


def check_equal(ours: nn.Module, theirs: nn.Module, x: Tensor, relu: bool = False) -> Tensor:
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = ours(first), theirs(second)
    expected = expected.relu() if relu else expected
    grad = torch.randn(expected.shape, dtype=x.dtype)
    y.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5, check_stride=False)
    torch.testing.assert_close(first.grad, second.grad, rtol=1e-4, atol=1e-5, check_stride=False)
    for mine, parameter in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, parameter.grad, rtol=1e-4, atol=1e-4)
    for mine, buffer in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, buffer, rtol=1e-4, atol=1e-5)
    return y


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("layout", ["feature-major", "contiguous_format", "channels_last"])
@pytest.mark.parametrize("options", NORMS)
def test_batch_norm_2d_equals_torch(options, layout, relu) -> None:
    theirs, ours = nn.BatchNorm2d(3, **options), BatchNorm2d(3, **options)
    assert isinstance(ours, nn.BatchNorm2d) and set(ours.state_dict()) == set(theirs.state_dict())
    ours.relu = relu
    if theirs.affine:
        nn.init.normal_(theirs.weight)
        nn.init.normal_(theirs.bias)
    ours.load_state_dict(theirs.state_dict())
    for mode in (True, True, False):
        ours.train(mode).zero_grad()
        theirs.train(mode).zero_grad()
        y = check_equal(ours, theirs, image(layout), relu)
        assert is_feature_major(y) == (layout == "feature-major")


@pytest.mark.parametrize("relu", [False, True])
def test_batch_norm_1d_equals_torch(relu) -> None:
    theirs, ours = nn.BatchNorm1d(5), BatchNorm1d(5)
    ours.relu = relu
    for mode in (True, False):
        ours.train(mode).zero_grad()
        theirs.train(mode).zero_grad()
        for x in (torch.randn(7, 5), torch.randn(5, 7).t(), torch.randn(6, 5, 4)):
            check_equal(ours, theirs, x, relu)


@pytest.mark.parametrize("layout", ["feature-major", "contiguous_format"])
def test_residual_is_added_before_relu(layout) -> None:
    norm = BatchNorm2d(3)
    norm.relu = True
    plain = nn.BatchNorm2d(3)
    x, residual = image(layout), image(layout)
    torch.testing.assert_close(
        norm(x, residual), (plain(x) + residual).relu(), rtol=1e-4, atol=1e-5, check_stride=False
    )


@pytest.mark.parametrize("layout", ["feature-major", "contiguous_format", "channels_last"])
@pytest.mark.parametrize("options", NORMS)
def test_norm_with_relu_and_pooling_equals_the_three_of_torch(options, layout) -> None:
    ours = BatchNorm2d(3, **options)
    ours.relu = ours.pool = True
    norm = nn.BatchNorm2d(3, **options)
    theirs = nn.Sequential(norm, nn.ReLU(), nn.MaxPool2d(2))
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    ours.load_state_dict(norm.state_dict())
    for mode in (True, True, False):
        ours.train(mode).zero_grad()
        theirs.train(mode).zero_grad()
        y = check_equal(ours, theirs, image(layout))
        assert y.shape == (4, 3, 4, 5)
        assert is_feature_major(y) == (layout == "feature-major")


def test_pooling_norm_takes_residuals_other_dtypes_and_flat_images() -> None:
    norm, plain = BatchNorm2d(3), nn.BatchNorm2d(3)
    norm.relu = norm.pool = True
    x, residual = image("feature-major"), image("feature-major")
    want = nn.functional.max_pool2d((plain(x) + residual).relu(), 2)
    torch.testing.assert_close(norm(x, residual), want, check_stride=False, rtol=1e-4, atol=1e-5)
    wide = image("feature-major", torch.float64)
    want = nn.functional.max_pool2d(plain.double()(wide).relu(), 2)
    torch.testing.assert_close(norm.double()(wide), want, check_stride=False)
    flat = empty_feature_major((4, 3, 1, 6)).normal_()
    with pytest.raises(ValueError, match="smaller than the window"):
        norm.float()(flat)


def test_norm_falls_back_on_other_dtypes() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        ours, theirs = BatchNorm2d(3, dtype=dtype), nn.BatchNorm2d(3, dtype=dtype)
        x = image("feature-major", dtype)
        torch.testing.assert_close(ours(x), theirs(x), check_stride=False)


def test_norm_refuses_what_torch_refuses() -> None:
    with pytest.raises(ValueError, match="4D"):
        BatchNorm2d(3)(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        BatchNorm1d(3)(torch.zeros(1, 3))


@pytest.mark.parametrize("layout", ["feature-major", "contiguous_format", "channels_last"])
@pytest.mark.parametrize("ours, theirs, options", POOLS)
def test_pool_equals_torch(ours, theirs, options, layout) -> None:
    assert issubclass(ours, theirs)
    y = check_equal(ours(**options), theirs(**options), image(layout))
    small = options["kernel_size"] != 16  # 256 taps are torch's
    assert is_feature_major(y) == (layout == "feature-major" and small)


def test_pool_returns_indices_and_takes_unbatched_images() -> None:
    x = image("feature-major")
    y, indices = MaxPool2d(2, return_indices=True)(x)
    expected = nn.MaxPool2d(2, return_indices=True)(x)
    assert torch.equal(y, expected[0]) and torch.equal(indices, expected[1])
    assert torch.equal(MaxPool2d(2)(x[0]), nn.MaxPool2d(2)(x[0]))
    assert torch.equal(AvgPool2d(2)(x[0]), nn.AvgPool2d(2)(x[0]))


def test_reference_backend_serves_them_too() -> None:
    block = nn.Sequential(BatchNorm2d(3), MaxPool2d(2), AvgPool2d(2))
    plain = nn.Sequential(nn.BatchNorm2d(3), nn.MaxPool2d(2), nn.AvgPool2d(2))
    with plan.use_backend("reference"):
        check_equal(copy.deepcopy(block), plain, image("feature-major"))
        norm = BatchNorm2d(3)
        norm.relu = norm.pool = True
        plain = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2))
        check_equal(norm, plain, image("feature-major"))
