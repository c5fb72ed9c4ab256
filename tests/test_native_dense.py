"""The native layout and batch norm kernels against torch in float64, per instruction set.

Activations are tensors of shape [C, H, W, N], contiguous: what feature-major memory looks like.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from native_support import address, error
from torch import Tensor
from torch.nn import functional as F

from sparse_kernels import _load

_native = _load.native()
ISAS = _native.supported_isas()
# Relative to the largest value; sums are short or kept in double.
TOLERANCE = 1e-5


@pytest.fixture(params=ISAS, autouse=True)
def native(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The module, using one instruction set after the other."""
    before = _native.isa()
    _native.set_isa(request.param)
    yield _native
    _native.set_isa(before)


# Layout ---------------------------------------------------------------------------------------

SIZES = [(1, 1), (1, 130), (130, 1), (3, 5), (8, 8), (64, 64), (65, 129), (100, 37), (7, 1000)]


@pytest.mark.parametrize(("batch", "features"), [*SIZES, (0, 5), (5, 0)])
def test_feature_major_and_back(native: Any, batch: int, features: int) -> None:
    x = torch.randn(batch, features)
    inner, back = torch.empty(features, batch), torch.empty(batch, features)
    native.to_feature_major(address(inner), address(x), batch, features, 2)
    assert torch.equal(inner, x.t())
    native.from_feature_major(address(back), address(inner), batch, features, 2)
    assert torch.equal(back, x)


@pytest.mark.parametrize("pixels", [1, 2, 35])
@pytest.mark.parametrize(("batch", "channels"), [(1, 3), (16, 9), (67, 70), (0, 4), (8, 64)])
def test_channels_last_and_back(native: Any, batch: int, channels: int, pixels: int) -> None:
    x = torch.randn(batch, pixels, channels)
    inner, back = torch.empty(channels, pixels, batch), torch.empty_like(x)
    native.nhwc_to_feature_major(address(inner), address(x), batch, channels, pixels, 2)
    assert torch.equal(inner, x.permute(2, 1, 0))
    native.nhwc_from_feature_major(address(back), address(inner), batch, channels, pixels, 2)
    assert torch.equal(back, x)


# Batch norm -----------------------------------------------------------------------------------


class NormCase(NamedTuple):
    id: str
    batch: int
    channels: int
    pixels: int
    affine: bool = True
    relu: bool = False
    residual: bool = False
    training: bool = True
    mean: float = 0.0  # of x, in standard deviations
    eps: float = 1e-5


NORM_CASES = [
    NormCase("linear", 37, 5, 1),
    NormCase("few values", 5, 3, 1, eps=1e-3),
    NormCase("several chunks", 67, 3, 97),
    NormCase("plain", 16, 7, 9, affine=False),
    NormCase("relu", 33, 4, 25, relu=True),
    NormCase("residual", 19, 4, 15, residual=True),
    NormCase("relu residual", 128, 3, 49, relu=True, residual=True),
    NormCase("large mean", 65, 3, 64, mean=1000.0, relu=True),
    NormCase("eval", 21, 6, 11, training=False),
    NormCase("eval relu residual", 1, 6, 11, training=False, relu=True, residual=True),
    NormCase("eval empty", 0, 3, 4, training=False, relu=True, residual=True),
]


class Norm(NamedTuple):
    """The tensors of a case in float32, batch innermost, and its float64 twin's results."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    offset: Tensor
    residual: Tensor | None
    grad: Tensor


def norm_tensors(case: NormCase) -> Norm:
    shape = (case.channels, case.pixels, case.batch)
    x = torch.randn(shape) + case.mean
    given = torch.randn(case.channels), torch.rand(case.channels) + 0.5
    blank = torch.empty(case.channels), torch.empty(case.channels)
    mean, var = blank if case.training else given
    weight = torch.randn(case.channels) if case.affine else None
    bias = torch.randn(case.channels) if case.affine else None
    residual = torch.randn(shape) if case.residual else None
    offset = torch.empty(case.channels)
    return Norm(x, weight, bias, mean, var, offset, residual, torch.randn(shape))


def norm_forward(native: Any, case: NormCase, t: Norm, threads: int = 2) -> Tensor:
    y = torch.empty_like(t.x)
    sizes = (case.batch, case.channels, case.pixels)
    arrays = [address(a) for a in (y, t.x, t.weight, t.bias, t.mean, t.var, t.offset, t.residual)]
    native.batch_norm_forward(*arrays, *sizes, case.training, case.eps, case.relu, threads)
    return y


def norm_backward(
    native: Any, case: NormCase, t: Norm, y: Tensor | None, threads: int = 2
) -> list[Tensor]:
    """dx, dweight, dbias, dresidual; without y the ReLU's mask is recomputed from x."""
    out = [
        torch.empty_like(t.x),
        torch.empty_like(t.mean),
        torch.empty_like(t.mean),
        torch.empty_like(t.x),
    ]
    arrays = [address(a) for a in (*out, t.grad, t.x, y, t.weight, t.mean, t.var, t.offset)]
    sizes = (case.batch, case.channels, case.pixels)
    native.batch_norm_backward(*arrays, *sizes, case.training, case.eps, case.relu, threads)
    return out


def norm_reference(case: NormCase, t: Norm, given_mask: Tensor) -> list[Tensor]:
    """y, mean, var, dx, dweight, dbias, dresidual in float64.

    The ReLU's mask is that of the float32 result: at its kink the two may rightly differ.
    """
    x = t.x.double().requires_grad_()
    weight = (torch.ones(case.channels) if t.weight is None else t.weight).double().requires_grad_()
    bias = (torch.zeros(case.channels) if t.bias is None else t.bias).double().requires_grad_()
    residual = (torch.zeros_like(t.x) if t.residual is None else t.residual).double()
    residual.requires_grad_()
    mean, var = t.mean.double(), t.var.double()
    if case.training:
        mean, var = x.mean((1, 2)), x.var((1, 2), unbiased=False)
    wide = (slice(None), None, None)
    y = (x - mean[wide]) / (var[wide] + case.eps).sqrt() * weight[wide] + bias[wide] + residual
    clipped = y * given_mask if case.relu else y
    clipped.backward(t.grad.double())
    shown = y.clamp(min=0) if case.relu else y
    grads = [x.grad, weight.grad, bias.grad, residual.grad]
    return [a.detach() for a in (shown, mean, var)] + [g for g in grads if g is not None]


@pytest.mark.parametrize("case", NORM_CASES, ids=lambda c: c.id)
def test_batch_norm(native: Any, case: NormCase) -> None:
    t = norm_tensors(case)
    y = norm_forward(native, case, t)
    grads = norm_backward(native, case, t, y)
    want = norm_reference(case, t, (y > 0).double())
    names = ("y", "mean", "var", "dx", "dweight", "dbias", "dresidual")
    for name, got, expected in zip(names, (y, t.mean, t.var, *grads), want, strict=True):
        assert error(got, expected) <= TOLERANCE, name


def test_batch_norm_agrees_with_torch(native: Any) -> None:
    """The reference above is our own arithmetic: hold it to torch's, once."""
    case = NormCase("torch", 12, 5, 7)
    t = norm_tensors(case)
    y = norm_forward(native, case, t)
    x = t.x.double().permute(2, 0, 1)
    assert t.weight is not None and t.bias is not None
    want = F.batch_norm(
        x, None, None, t.weight.double(), t.bias.double(), training=True, eps=case.eps
    )
    assert error(y, want.permute(1, 2, 0)) <= TOLERANCE


def test_batch_norm_of_a_huge_mean_keeps_its_digits(native: Any) -> None:
    """The variance of 16384 +- 1: a sum of squares in float would have no digit left."""
    case = NormCase("huge", 64, 2, 300, mean=16384.0)
    t = norm_tensors(case)
    norm_forward(native, case, t)
    assert error(t.var, t.x.double().var((1, 2), unbiased=False)) <= 1e-6


def test_batch_norm_in_place_and_nan(native: Any) -> None:
    case = NormCase("nan", 40, 3, 5, relu=True)
    t = norm_tensors(case)
    t.x[1, 2, 3] = float("nan")
    y = norm_forward(native, case, t)
    assert y[1].isnan().all() and not y[0].isnan().any() and not y[2].isnan().any()
    arrays = [address(a) for a in (t.x, t.x, t.weight, t.bias, t.mean, t.var, None, None)]
    native.batch_norm_forward(*arrays, 40, 3, 5, True, case.eps, True, 1)
    assert torch.equal(t.x[::2], y[::2])


@pytest.mark.parametrize("case", NORM_CASES, ids=lambda c: c.id)
def test_batch_norm_does_not_depend_on_threads(native: Any, case: NormCase) -> None:
    t = norm_tensors(case)
    results = []
    for threads in (1, 2, 5):
        y = norm_forward(native, case, t, threads)
        results.append(
            [y, t.mean.clone(), t.var.clone(), *norm_backward(native, case, t, y, threads)]
        )
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


def test_batch_norm_writes_only_what_is_wanted(native: Any) -> None:
    case = NormCase("some", 9, 4, 3)
    t = norm_tensors(case)
    y = norm_forward(native, case, t)
    every = norm_backward(native, case, t, y)
    arrays = [address(a) for a in (t.grad, t.x, None, t.weight, t.mean, t.var, None)]
    for index, want in enumerate(every):
        got = torch.empty_like(want)
        out = [address(got) if i == index else 0 for i in range(4)]
        native.batch_norm_backward(*out, *arrays, 9, 4, 3, True, case.eps, False, 2)
        assert torch.equal(got, want)


# Wrong arguments ------------------------------------------------------------------------------


def test_wrong_arguments_are_refused_with_their_name_and_value(native: Any) -> None:
    x = torch.zeros(8)
    a = address(x)
    with pytest.raises(ValueError, match=r"to_feature_major: threads must be .*, got 0"):
        native.to_feature_major(a, a, 2, 4, 0)
    with pytest.raises(ValueError, match="dst must not be null, expected the address of 8"):
        native.to_feature_major(0, a, 2, 4, 1)
    with pytest.raises(ValueError, match="batch must be at least 0, got -1"):
        native.batch_norm_forward(a, a, 0, 0, a, a, 0, 0, -1, 1, 1, True, 1e-5, False, 1)
    with pytest.raises(ValueError, match="with relu, y or offset .* must be there"):
        native.batch_norm_backward(a, 0, 0, 0, a, a, 0, 0, a, a, 0, 2, 2, 2, True, 1e-5, True, 1)
    with pytest.raises(ValueError, match="14 integers .*, got 3"):
        native.max_pool2d(a, a, a, [1, 2, 3], 1)
    dims = [1, 1, 16, 16, 1, 1, 16, 16, 1, 1, 0, 0, 1, 1]
    with pytest.raises(ValueError, match="at most 255 taps .*, got 16 x 16"):
        native.max_pool2d(a, a, a, dims, 1)
    with pytest.raises(ValueError, match="sh must be at least 1, got 0"):
        native.avg_pool2d(a, a, [1, 1, 2, 2, 1, 1, 2, 2, 0, 1, 0, 0, 1, 1], True, 0, 1)
    with pytest.raises(ValueError, match="dilation must be 1, got 2 x 1"):
        native.avg_pool2d(a, a, [1, 1, 2, 2, 1, 1, 2, 2, 1, 1, 0, 0, 2, 1], True, 0, 1)
