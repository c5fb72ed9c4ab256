"""Native batch norm: the ReLU's mask without its output, large and cut channels, fused pooling.

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
TOLERANCE = 1e-5  # relative to the largest value; sums are short or kept in double
EPS = 1e-3
NO_TAP = 255


@pytest.fixture(params=ISAS, autouse=True)
def native(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The module, using one instruction set after the other."""
    before = _native.isa()
    _native.set_isa(request.param)
    yield _native
    _native.set_isa(before)


class Norm(NamedTuple):
    """Operands of one batch norm with ReLU."""

    x: Tensor  # [C, pixels, N]
    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    offset: Tensor
    grad: Tensor


def norm_of(x: Tensor) -> Norm:
    c = x.shape[0]
    blank = [torch.full((c,), float("nan")) for _ in range(3)]
    return Norm(x, torch.randn(c), torch.randn(c) * 0.1, *blank, torch.randn(x.shape))


def sizes(t: Norm) -> tuple[int, int, int]:
    return t.x.shape[2], t.x.shape[0], t.x.shape[1]


def forward(native: Any, t: Norm, y: Tensor, threads: int = 2) -> Tensor:
    arrays = (y, t.x, t.weight, t.bias, t.mean, t.var, t.offset, None)
    native.batch_norm_forward(*map(address, arrays), *sizes(t), True, EPS, True, threads)
    return y


def backward(native: Any, t: Norm, y: Tensor | None, dx: Tensor, threads: int = 2) -> list[Tensor]:
    """dx, dweight, dbias."""
    out = [dx, torch.empty_like(t.mean), torch.empty_like(t.mean)]
    arrays = (*out, None, t.grad, t.x, y, t.weight, t.mean, t.var, t.offset)
    native.batch_norm_backward(*map(address, arrays), *sizes(t), True, EPS, True, threads)
    return out


# The ReLU's mask -------------------------------------------------------------------------------


def at_the_kink(native: Any, batch: int) -> Norm:
    """A norm whose outputs are within a few roundings of 0, most of them."""
    t = norm_of(torch.randn(5, 7, batch) * 1e-6 + 3.0)
    t.weight.fill_(1.0)
    t.bias.zero_()
    t.x[1, 2, 3] = float("nan")
    return t


@pytest.mark.parametrize("batch", [16, 67])
def test_the_mask_from_x_is_that_of_the_output_to_the_last_bit(native: Any, batch: int) -> None:
    for t in (at_the_kink(native, batch), norm_of(torch.randn(5, 7, batch) + 1000.0)):
        y = forward(native, t, torch.empty_like(t.x))
        assert 0.2 < (y > 0).float().mean() < 0.8
        with_y = backward(native, t, y, torch.empty_like(t.x))
        without = backward(native, t, None, torch.empty_like(t.x))
        for first, second in zip(with_y, without, strict=True):
            assert torch.equal(first.nan_to_num(7.0), second.nan_to_num(7.0))


# Large outputs, cut channels -------------------------------------------------------------------

LARGE = (3, 300, 4096)  # 14.7 MB: written past the cache; a channel is more than one part


def shifted(x: Tensor) -> Tensor:
    """A tensor of the shape of x, one float beyond any vector's alignment."""
    return torch.empty(x.numel() + 1)[1:].view(x.shape)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_large_norm_does_not_depend_on_threads_or_alignment(native: Any, threads: int) -> None:
    t = norm_of(torch.randn(LARGE) * 2 + 1)
    y = forward(native, t, torch.empty_like(t.x), threads)
    stats = [t.mean.clone(), t.var.clone(), t.offset.clone()]
    grads = backward(native, t, None, torch.empty_like(t.x), threads)
    assert error(t.mean, t.x.double().mean((1, 2))) <= 1e-6
    assert error(t.var, t.x.double().var((1, 2), unbiased=False)) <= 1e-6
    # Aligned by chance of the allocator or not: stored either way, the values are the same.
    assert torch.equal(forward(native, t, shifted(y), 2), y)
    assert all(map(torch.equal, stats, (t.mean, t.var, t.offset)))
    assert all(map(torch.equal, backward(native, t, None, shifted(y), 2), grads))


def test_an_outlier_first_does_not_spoil_the_variance(native: Any) -> None:
    """The shift of the sums is a mean, not the first element."""
    t = norm_of(torch.randn(2, 50, 512))
    t.x[:, 0, 0] = 3e4
    forward(native, t, torch.empty_like(t.x))
    assert error(t.var, t.x.double().var((1, 2), unbiased=False)) <= 1e-6


def test_a_drifting_mean_keeps_the_digits(native: Any) -> None:
    t = norm_of(torch.randn(2, 200, 256) + torch.linspace(0, 5e3, 200)[None, :, None])
    forward(native, t, torch.empty_like(t.x))
    assert error(t.var, t.x.double().var((1, 2), unbiased=False)) <= 1e-6


# Norm, ReLU and pooling in one pass --------------------------------------------------------------


class PoolCase(NamedTuple):
    id: str
    batch: int
    channels: int
    height: int
    width: int
    training: bool = True
    mean: float = 0.0


CASES = [
    PoolCase("vgg", 128, 3, 8, 8),
    PoolCase("odd image, tail", 67, 2, 7, 9),
    PoolCase("batch under a vector", 3, 5, 6, 4),
    PoolCase("one window", 32, 2, 3, 2),
    PoolCase("large mean", 40, 3, 10, 6, mean=1000.0),
    PoolCase("eval", 21, 4, 5, 6, training=False),
    PoolCase("large", 400, 4, 50, 50),
]


class Fused(NamedTuple):
    y: Tensor
    argmax: Tensor
    mean: Tensor
    var: Tensor
    rounding: Tensor


def operands(case: PoolCase) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and a gradient of y."""
    c, h, w = case.channels, case.height, case.width
    x = torch.randn(c, h, w, case.batch) + case.mean
    return x, torch.randn(c), torch.randn(c), torch.randn(c, h // 2, w // 2, case.batch)


def dims(case: PoolCase) -> list[int]:
    return [case.batch, case.channels, case.height, case.width]


def fused(native: Any, case: PoolCase, x: Tensor, w: Tensor, b: Tensor, threads: int = 2) -> Fused:
    y = torch.empty(case.channels, case.height // 2, case.width // 2, case.batch)
    stats = [torch.linspace(0.5, 1.5, case.channels) for _ in range(2)]  # evaluation's; overwritten
    out = Fused(y, torch.empty(y.shape, dtype=torch.uint8), *stats, torch.empty(case.channels))
    arrays = (out.y, out.argmax, x, w, b, out.mean, out.var, out.rounding)
    native.batch_norm_pool(*map(address, arrays), dims(case), case.training, EPS, threads)
    return out


def fused_backward(
    native: Any, case: PoolCase, grad: Tensor, x: Tensor, w: Tensor, f: Fused, threads: int = 2
) -> list[Tensor]:
    """dx, dweight, dbias."""
    out = [torch.full_like(x, float("nan")), torch.empty_like(w), torch.empty_like(w)]
    arrays = (*out, grad, f.argmax, x, w, f.mean, f.var, f.rounding)
    native.batch_norm_pool_backward(*map(address, arrays), dims(case), case.training, EPS, threads)
    return out


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_norm_pool(native: Any, case: PoolCase) -> None:
    x, w, b, grad = operands(case)
    f = fused(native, case, x, w, b)
    leaves = [t.double().requires_grad_() for t in (x.permute(3, 0, 1, 2), w, b)]
    given = None if case.training else f.mean.double(), None if case.training else f.var.double()
    normed = F.batch_norm(leaves[0], *given, *leaves[1:], training=case.training, eps=EPS)
    want, index = F.max_pool2d(normed.relu(), 2, return_indices=True)
    # The kernel's own choices: at the kink and between near ties float64 may rightly differ.
    passing = (f.argmax != NO_TAP).permute(3, 0, 1, 2)
    rows = 2 * torch.arange(case.height // 2)[:, None] + (f.argmax // 2 % 2).permute(3, 0, 1, 2)
    cols = 2 * torch.arange(case.width // 2) + (f.argmax % 2).permute(3, 0, 1, 2)
    chosen = (rows.long() * case.width + cols.long()).flatten(2)
    picked = normed.flatten(2).gather(2, chosen).view_as(want) * passing
    assert ((chosen.view_as(want) == index) | (want == 0)).float().mean() > 0.999
    picked.backward(grad.double().permute(3, 0, 1, 2))
    assert error(f.y.permute(3, 0, 1, 2), want.detach()) <= TOLERANCE
    assert torch.equal(f.argmax == NO_TAP, f.y == 0)
    dx, dw, db = fused_backward(native, case, grad, x, w, f)
    for got, leaf in zip((dx.permute(3, 0, 1, 2), dw, db), leaves, strict=True):
        assert leaf.grad is not None
        assert error(got, leaf.grad) <= TOLERANCE


@pytest.mark.parametrize("case", CASES[:3], ids=lambda c: c.id)
def test_norm_pool_equals_norm_then_pool_bit_for_bit(native: Any, case: PoolCase) -> None:
    x, w, b, _ = operands(case)
    x[0, 1, 1, 2] = float("nan")
    f = fused(native, case, x, w, b)
    t = norm_of(x.flatten(1, 2))._replace(weight=w, bias=b)
    normed = forward(native, t, torch.empty_like(t.x)).view_as(x)
    y, argmax = torch.empty_like(f.y), torch.empty_like(f.argmax)
    shape = [*dims(case), case.height // 2, case.width // 2, 2, 2, 2, 2, 0, 0, 1, 1]
    native.max_pool2d(address(y), address(argmax), address(normed), shape, 2)
    assert torch.equal(f.y.nan_to_num(9.0), y.nan_to_num(9.0))
    assert torch.equal(f.argmax, argmax.masked_fill(y <= 0, NO_TAP))
    assert f.y[0].isnan().all() and not f.y[1:].isnan().any()


def test_norm_pool_lets_one_nan_win_and_pass_its_gradient(native: Any) -> None:
    case = PoolCase("nan", 20, 2, 4, 4, training=False)
    x, w, b, grad = operands(case)
    x[1, 0, 1, 7] = float("nan")
    f = fused(native, case, x, w, b)
    assert f.y.isnan().sum() == 1 and f.argmax[1, 0, 0, 7] == 1
    fused_backward(native, case, grad, x, w, f)
    assert fused_backward(native, case, grad, x, w, f)[2].isfinite().all()  # sums of the gradient


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_norm_pool_does_not_depend_on_threads(native: Any, case: PoolCase) -> None:
    x, w, b, grad = operands(case)
    results = []
    for threads in (1, 2, 5):
        f = fused(native, case, x, w, b, threads)
        results.append([*f, *fused_backward(native, case, grad, x, w, f, threads)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_norm_pool_of_an_empty_batch(native: Any) -> None:
    case = PoolCase("empty", 0, 3, 4, 4, training=False)
    x, w, b, grad = operands(case)
    f = fused(native, case, x, w, b)
    assert not any(t.any() for t in fused_backward(native, case, grad, x, w, f)[1:])


def test_wrong_arguments_are_refused_with_their_name_and_value(native: Any) -> None:
    a = address(torch.zeros(64))
    with pytest.raises(ValueError, match="4 integers batch, channels, height, width, got 3"):
        native.batch_norm_pool(*[a] * 8, [1, 2, 3], True, EPS, 1)
    with pytest.raises(ValueError, match="batch_norm_pool: height must be at least 2, got 1"):
        native.batch_norm_pool(*[a] * 8, [1, 2, 1, 4], True, EPS, 1)
    with pytest.raises(ValueError, match="batch_norm_pool_backward: argmax must not be null"):
        native.batch_norm_pool_backward(a, 0, 0, a, 0, *[a] * 5, [1, 2, 4, 4], True, EPS, 1)
