"""The native layout, batch norm and pooling kernels against torch in float64, on every instruction set.

Activations are tensors of shape [C, H, W, N], contiguous: what feature-major memory looks like.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_kernels._load import native_or_none
from sparse_kernels.geometry import pool_output_size

_native = native_or_none()
if _native is None:
    raise RuntimeError("the native module is not built: run `pip install .` or `make native`")

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


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def batch_inner(x: Tensor) -> Tensor:
    """[N, C, ...] -> contiguous float32 [C, ..., N]."""
    return x.movedim(0, -1).to(torch.float32).contiguous()


def error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in float64, 0 for two empty tensors; infinite if the shapes differ."""
    if got.shape != want.shape:
        return float("inf")
    if want.numel() == 0:
        return 0.0
    return ((got.double() - want).norm() / want.norm().clamp(min=1e-30)).item()


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
    return Norm(x, weight, bias, mean, var, residual, torch.randn(shape))


def norm_forward(native: Any, case: NormCase, t: Norm, threads: int = 2) -> Tensor:
    y = torch.empty_like(t.x)
    sizes = (case.batch, case.channels, case.pixels)
    arrays = [address(a) for a in (y, t.x, t.weight, t.bias, t.mean, t.var, t.residual)]
    native.batch_norm_forward(*arrays, *sizes, case.training, case.eps, case.relu, threads)
    return y


def norm_backward(native: Any, case: NormCase, t: Norm, y: Tensor, threads: int = 2) -> list[Tensor]:
    """dx, dweight, dbias, dresidual."""
    out = [
        torch.empty_like(t.x),
        torch.empty_like(t.mean),
        torch.empty_like(t.mean),
        torch.empty_like(t.x),
    ]
    arrays = [address(a) for a in (*out, t.grad, t.x, y, t.weight, t.mean, t.var)]
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
    arrays = [address(a) for a in (t.x, t.x, t.weight, t.bias, t.mean, t.var, None)]
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
    arrays = [address(a) for a in (t.grad, t.x, None, t.weight, t.mean, t.var)]
    for index, want in enumerate(every):
        got = torch.empty_like(want)
        out = [address(got) if i == index else 0 for i in range(4)]
        native.batch_norm_backward(*out, *arrays, 9, 4, 3, True, case.eps, False, 2)
        assert torch.equal(got, want)


# Pooling --------------------------------------------------------------------------------------


class PoolCase(NamedTuple):
    id: str
    batch: int
    channels: int
    height: int
    width: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False

    def out(self) -> tuple[int, int]:
        return pool_output_size(
            (self.height, self.width),
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            self.ceil_mode,
        )

    def dims(self) -> list[int]:
        sizes = [self.batch, self.channels, self.height, self.width, *self.out()]
        return [*sizes, *self.kernel, *self.stride, *self.padding, *self.dilation]


POOL_CASES = [
    PoolCase("vgg", 128, 3, 8, 8, (2, 2), (2, 2)),
    PoolCase("odd", 67, 2, 7, 9, (2, 2), (2, 2), ceil_mode=True),
    PoolCase("overlap", 5, 3, 11, 6, (3, 3), (2, 2), (1, 1)),
    PoolCase("oblong", 1, 2, 9, 13, (3, 5), (1, 3), (1, 2), ceil_mode=True),
    PoolCase("gaps", 33, 1, 10, 10, (2, 2), (3, 4)),
    PoolCase("whole image", 70, 4, 5, 6, (5, 6), (1, 1)),
    PoolCase("no batch", 0, 3, 4, 4, (2, 2), (2, 2)),
]
DILATED = [
    PoolCase("dilated", 17, 2, 12, 11, (3, 2), (2, 1), (1, 1), (2, 3)),
    PoolCase("dilated ceil", 65, 1, 13, 9, (3, 3), (2, 2), (1, 0), (3, 2), ceil_mode=True),
]


def pool_input(case: PoolCase) -> tuple[Tensor, Tensor]:
    """x [C, H, W, N] without ties, and a gradient [C, OH, OW, N]."""
    shape = (case.channels, case.height, case.width, case.batch)
    size = int(torch.tensor(shape).prod())
    x = (torch.randperm(size).float() / max(size, 1) - 0.5).reshape(shape)
    return x, torch.randn(case.channels, *case.out(), case.batch)


def torch_order(x: Tensor) -> Tensor:
    return x.double().permute(3, 0, 1, 2)


def max_pool(native: Any, case: PoolCase, x: Tensor, threads: int = 2) -> tuple[Tensor, Tensor]:
    y = torch.empty(case.channels, *case.out(), case.batch)
    argmax = torch.empty(y.shape, dtype=torch.uint8)
    native.max_pool2d(address(y), address(argmax), address(x), case.dims(), threads)
    return y, argmax


def max_pool_backward(
    native: Any, case: PoolCase, grad: Tensor, argmax: Tensor, threads: int = 2
) -> Tensor:
    dx = torch.empty(case.channels, case.height, case.width, case.batch)
    native.max_pool2d_backward(
        address(dx), address(grad), address(argmax), case.dims(), threads
    )
    return dx


@pytest.mark.parametrize("case", [*POOL_CASES, *DILATED], ids=lambda c: c.id)
def test_max_pool(native: Any, case: PoolCase) -> None:
    x, grad = pool_input(case)
    y, argmax = max_pool(native, case, x)
    leaf = torch_order(x).requires_grad_()
    want = F.max_pool2d(
        leaf, case.kernel, case.stride, case.padding, case.dilation, case.ceil_mode
    )
    want.backward(torch_order(grad))
    assert torch.equal(torch_order(y), want)
    assert leaf.grad is not None
    assert error(torch_order(max_pool_backward(native, case, grad, argmax)), leaf.grad) <= TOLERANCE
    assert bool((argmax < case.kernel[0] * case.kernel[1]).all())


def test_max_pool_nan_infinity_and_ties(native: Any) -> None:
    """torch's choices: NaN wins, of equal values the first, and -inf is a value like others."""
    case = PoolCase("special", 66, 1, 4, 6, (2, 3), (2, 3))
    x = torch.zeros(1, 4, 6, 66)
    x[0, :2, :3] = float("-inf")
    x[0, 1, 4] = float("nan")
    x[0, 0, 4] = float("inf")
    x[0, 3, 1], x[0, 2, 2] = 7.0, 7.0
    y, argmax = max_pool(native, case, x)
    want, index = F.max_pool2d(torch_order(x), (2, 3), return_indices=True)
    assert torch.equal(torch_order(y).nan_to_num(99.0), want.nan_to_num(99.0))
    first = torch.tensor([[0, 3], [12, 15]])  # the windows' first pixels
    taps = torch.tensor([[0, 0], [0, 0]]) + index[0, 0] - first
    assert torch.equal(argmax[0, :, :, 0].long(), taps // 6 * 3 + taps % 6)
    assert argmax[0, :, :, 0].tolist() == [[0, 4], [2, 0]]


def test_max_pool_of_a_window_without_taps(native: Any) -> None:
    """Taps at rows -1 and 1 of an image of one row: -inf, and no gradient anywhere."""
    case = PoolCase("nothing", 3, 1, 1, 1, (2, 1), (1, 1), (1, 0), (2, 1))
    assert case.out() == (1, 1)
    y, argmax = max_pool(native, case, torch.ones(1, 1, 1, 3))
    assert bool((y == float("-inf")).all()) and bool((argmax == 255).all())
    assert not max_pool_backward(native, case, torch.ones(1, 1, 1, 3), argmax).any()


@pytest.mark.parametrize("divisor", [0, 3])
@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("case", POOL_CASES, ids=lambda c: c.id)
def test_avg_pool(native: Any, case: PoolCase, include: bool, divisor: int) -> None:
    x, grad = pool_input(case)
    y, dx = torch.empty_like(grad), torch.empty_like(x)
    native.avg_pool2d(address(y), address(x), case.dims(), include, divisor, 2)
    native.avg_pool2d_backward(address(dx), address(grad), case.dims(), include, divisor, 2)
    leaf = torch_order(x).requires_grad_()
    window = (case.kernel, case.stride, case.padding, case.ceil_mode, include, divisor or None)
    want = F.avg_pool2d(leaf, *window)
    want.backward(torch_order(grad))
    assert leaf.grad is not None
    assert error(torch_order(y), want.detach()) <= TOLERANCE
    assert error(torch_order(dx), leaf.grad) <= TOLERANCE


@pytest.mark.parametrize("case", [POOL_CASES[2], POOL_CASES[3]], ids=lambda c: c.id)
def test_pooling_does_not_depend_on_threads(native: Any, case: PoolCase) -> None:
    x, grad = pool_input(case)
    results = []
    for threads in (1, 2, 5):
        y, argmax = max_pool(native, case, x, threads)
        mean, dmean = torch.empty_like(y), torch.empty_like(x)
        native.avg_pool2d(address(mean), address(x), case.dims(), True, 0, threads)
        native.avg_pool2d_backward(address(dmean), address(grad), case.dims(), True, 0, threads)
        back = max_pool_backward(native, case, grad, argmax, threads)
        results.append([y, argmax, back, mean, dmean])
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


# Wrong arguments ------------------------------------------------------------------------------


def test_wrong_arguments_are_refused_with_their_name_and_value(native: Any) -> None:
    x = torch.zeros(8)
    a = address(x)
    with pytest.raises(ValueError, match=r"to_feature_major: threads must be .*, got 0"):
        native.to_feature_major(a, a, 2, 4, 0)
    with pytest.raises(ValueError, match="dst must not be null, expected the address of 8"):
        native.to_feature_major(0, a, 2, 4, 1)
    with pytest.raises(ValueError, match="batch must be at least 0, got -1"):
        native.batch_norm_forward(a, a, 0, 0, a, a, 0, -1, 1, 1, True, 1e-5, False, 1)
    with pytest.raises(ValueError, match=r"y \(the ReLU's mask\) must not be null"):
        native.batch_norm_backward(a, 0, 0, 0, a, a, 0, 0, a, a, 2, 2, 2, True, 1e-5, True, 1)
    with pytest.raises(ValueError, match="14 integers .*, got 3"):
        native.max_pool2d(a, a, a, [1, 2, 3], 1)
    dims = [1, 1, 16, 16, 1, 1, 16, 16, 1, 1, 0, 0, 1, 1]
    with pytest.raises(ValueError, match="at most 255 taps .*, got 16 x 16"):
        native.max_pool2d(a, a, a, dims, 1)
    with pytest.raises(ValueError, match="sh must be at least 1, got 0"):
        native.avg_pool2d(a, a, [1, 1, 2, 2, 1, 1, 2, 2, 0, 1, 0, 0, 1, 1], True, 0, 1)
    with pytest.raises(ValueError, match="dilation must be 1, got 2 x 1"):
        native.avg_pool2d(a, a, [1, 1, 2, 2, 1, 1, 2, 2, 1, 1, 0, 0, 2, 1], True, 0, 1)
