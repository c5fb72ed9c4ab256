"""The reference backend against torch's own operators on masked dense weights, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import (
    CONV_CASES,
    LINEAR_CASES,
    ConvCase,
    LinearCase,
    make_conv,
    make_linear,
    random_conv_cases,
    random_linear_cases,
    relative_error,
    tolerance,
)

from sparse_kernels.backends import reference
from sparse_kernels.geometry import Conv2dGeometry
from sparse_kernels.layout import feature_major_strides
from sparse_kernels.pattern import SparsityPattern

LINEAR = [*LINEAR_CASES, *random_linear_cases(20, seed=1)]
CONV = [*CONV_CASES, *random_conv_cases(30, seed=2)]
TIGHT = 1e-12
HALVES = [torch.bfloat16, torch.float16]


def check(out: torch.Tensor, ref: torch.Tensor, bound: float = TIGHT) -> None:
    assert relative_error(out, ref) <= bound


def check_activation(out: torch.Tensor, ref: torch.Tensor, bound: float = TIGHT) -> None:
    assert out.stride() == feature_major_strides(out.shape)
    check(out, ref, bound)


def check_values(dvalues: torch.Tensor, dense: torch.Tensor, pattern: SparsityPattern) -> None:
    """Values at the pattern; zero in the tail and outside of the matrix."""
    check(dvalues, pattern.compress(dense))
    assert not dvalues[pattern.nnzb :].any()
    inside = pattern.inside_mask()
    assert inside is None or not dvalues[: pattern.nnzb][~inside].any()


@pytest.mark.parametrize("case", LINEAR, ids=lambda case: case.id)
def test_linear(case: LinearCase, generator: torch.Generator) -> None:
    t = make_linear(case, torch.float64, generator)
    indices, pattern = t["indices"], t["pattern"]
    x, matrix = t["x"].clone().requires_grad_(), t["matrix"].clone().requires_grad_()
    y = F.linear(x, matrix, t["bias"])
    out = reference.linear(t["x"], t["values"], *indices, t["bias"], case.out_features, False)
    check_activation(out, y)
    relu = reference.linear(t["x"], t["values"], *indices, t["bias"], case.out_features, True)
    check_activation(relu, y.relu())
    dx, dmatrix = torch.autograd.grad(y, (x, matrix), t["grad"])
    check_activation(reference.linear_dgrad(t["grad"], t["values"], *indices, case.in_features), dx)
    check(reference.linear_wgrad_dense(t["grad"], t["x"]), dmatrix)
    check_values(reference.linear_wgrad(t["grad"], t["x"], *indices, *case.block), dmatrix, pattern)


def dense_conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, g: Conv2dGeometry
) -> torch.Tensor:
    """The convolution as a sum over taps of strided slices: nothing but indexing and einsum."""
    padded = F.pad(x, (g.pad_left, g.pad_right, g.pad_top, g.pad_bottom))
    out_h, out_w = g.output_size(x.shape[2], x.shape[3])
    split = weight.view(g.groups, -1, *weight.shape[1:])
    y = x.new_zeros(x.shape[0], g.out_channels, out_h, out_w)
    for ky in range(g.kernel_height):
        for kx in range(g.kernel_width):
            top, left = ky * g.dilation_h, kx * g.dilation_w
            rows = slice(top, top + (out_h - 1) * g.stride_h + 1, g.stride_h)
            cols = slice(left, left + (out_w - 1) * g.stride_w + 1, g.stride_w)
            shifted = padded[:, :, rows, cols].unflatten(1, (g.groups, -1))
            y = y + torch.einsum("ngihw,goi->ngohw", shifted, split[..., ky, kx]).flatten(1, 2)
    return y if bias is None else y + bias[:, None, None]


@pytest.mark.parametrize("case", CONV, ids=lambda case: case.id)
def test_conv2d(case: ConvCase, generator: torch.Generator) -> None:
    t = make_conv(case, torch.float64, generator)
    g, indices, pattern, geometry = case.geometry, t["indices"], t["pattern"], t["geometry"]
    x, weight = t["x"].clone().requires_grad_(), t["weight"].clone().requires_grad_()
    y = dense_conv2d(x, weight, t["bias"], g)
    out = reference.conv2d(t["x"], t["values"], *indices, t["bias"], geometry, False)
    check_activation(out, y)
    if case.batch > 0:
        pads = (g.pad_left, g.pad_right, g.pad_top, g.pad_bottom)
        strides, dilations = (g.stride_h, g.stride_w), (g.dilation_h, g.dilation_w)
        padded = F.pad(t["x"], pads)
        check(out, F.conv2d(padded, t["weight"], t["bias"], strides, 0, dilations, g.groups))
    relu = reference.conv2d(t["x"], t["values"], *indices, t["bias"], geometry, True)
    check_activation(relu, y.relu())
    dx, dweight = torch.autograd.grad(y, (x, weight), t["grad"])
    size = (case.height, case.width)
    check_activation(reference.conv2d_dgrad(t["grad"], t["values"], *indices, *size, geometry), dx)
    dmatrix = dweight.permute(0, 2, 3, 1).reshape(pattern.shape)
    check(reference.conv2d_wgrad_dense(t["grad"], t["x"], geometry), dmatrix)
    dvalues = reference.conv2d_wgrad(t["grad"], t["x"], *indices, *case.block, geometry)
    check_values(dvalues, dmatrix, pattern)


STRIDES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "feature_major": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
}


@pytest.mark.parametrize("strides", STRIDES)
def test_strides_of_the_input_do_not_matter(strides: str, generator: torch.Generator) -> None:
    t = make_conv(CONV_CASES[3], torch.float64, generator)
    relayed = STRIDES[strides]
    indices, geometry, values = t["indices"], t["geometry"], t["values"]
    x, grad = relayed(t["x"]), relayed(t["grad"])
    for got, want in (
        (
            reference.conv2d(x, values, *indices, None, geometry, False),
            reference.conv2d(t["x"], values, *indices, None, geometry, False),
        ),
        (
            reference.conv2d_dgrad(grad, values, *indices, 9, 7, geometry),
            reference.conv2d_dgrad(t["grad"], values, *indices, 9, 7, geometry),
        ),
        (
            reference.conv2d_wgrad(grad, x, *indices, 1, 1, geometry),
            reference.conv2d_wgrad(t["grad"], t["x"], *indices, 1, 1, geometry),
        ),
    ):
        check(got, want)


def test_expanded_gradient(generator: torch.Generator) -> None:
    t = make_linear(LINEAR_CASES[-1], torch.float64, generator)
    ones = torch.ones((), dtype=torch.float64).expand(t["grad"].shape)
    out = reference.linear_wgrad(ones, t["x"], *t["indices"], *LINEAR_CASES[-1].block)
    check(out, t["pattern"].compress(ones.contiguous().t() @ t["x"]))


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_low_precision_accumulates_in_float32(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Half activations keep their dtype; gradients of float32 values are float32."""
    case = LinearCase("long", 20, 3000, 10, 0.5, (2, 1))
    t = make_linear(case, torch.float32, generator)
    x, grad, indices = t["x"].to(dtype), t["grad"].to(dtype), t["indices"]
    wide_x, wide_grad, matrix = x.double(), grad.double(), t["matrix"].double()
    out = reference.linear(x, t["values"], *indices, t["bias"], 10, False)
    dx = reference.linear_dgrad(grad, t["values"], *indices, 3000)
    dvalues = reference.linear_wgrad(grad, x, *indices, 2, 1)
    assert (out.dtype, dx.dtype, dvalues.dtype) == (dtype, dtype, torch.float32)
    check(out, wide_x @ matrix.t() + t["bias"].double(), tolerance(dtype, 3000))
    check(dx, wide_grad @ matrix, tolerance(dtype, 10))
    dense = t["pattern"].compress(wide_grad.t() @ wide_x)
    check(dvalues, dense, tolerance(torch.float32, 20))


# -- gradients agree with finite differences -------------------------------------------------------


class LinearByReference(torch.autograd.Function):
    """Ties the reference's three products together, so that gradcheck sees them as one function."""

    @staticmethod
    def forward(ctx: Any, x: Any, values: Any, bias: Any, indices: Any, size: Any) -> Any:
        ctx.save_for_backward(x, values)
        ctx.indices, ctx.size = indices, size
        return reference.linear(x, values, *indices, bias, size[0], False)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, values = ctx.saved_tensors
        dx = reference.linear_dgrad(grad, values, *ctx.indices, ctx.size[1])
        dvalues = reference.linear_wgrad(grad, x, *ctx.indices, *values.shape[1:])
        return dx, dvalues, grad.sum(0), None, None


class ConvByReference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, values: Any, bias: Any, indices: Any, geometry: Any) -> Any:
        ctx.save_for_backward(x, values)
        ctx.indices, ctx.geometry = indices, geometry
        return reference.conv2d(x, values, *indices, bias, geometry, False)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        x, values = ctx.saved_tensors
        dx = reference.conv2d_dgrad(grad, values, *ctx.indices, *x.shape[2:], ctx.geometry)
        dvalues = reference.conv2d_wgrad(grad, x, *ctx.indices, *values.shape[1:], ctx.geometry)
        return dx, dvalues, grad.sum((0, 2, 3)), None, None


@pytest.mark.parametrize("block", [(1, 1), (2, 1), (3, 2)])
def test_gradcheck(block: tuple[int, int], generator: torch.Generator) -> None:
    linear = LinearCase("tiny", 3, 5, 4, 0.5, block)
    t = make_linear(linear, torch.float64, generator)
    inputs = [t[name].requires_grad_() for name in ("x", "values", "bias")]
    assert torch.autograd.gradcheck(
        lambda *args: LinearByReference.apply(*args, t["indices"], (4, 5)), inputs
    )
    geometry = Conv2dGeometry(6, 4, 2, 3, 2, 1, 1, 0, 0, 2, 1, 2, 2)
    t = make_conv(ConvCase("tiny", 2, 3, 3, geometry, 0.5, block), torch.float64, generator)
    inputs = [t[name].requires_grad_() for name in ("x", "values", "bias")]
    assert torch.autograd.gradcheck(
        lambda *args: ConvByReference.apply(*args, t["indices"], t["geometry"]), inputs
    )


# -- pooling ---------------------------------------------------------------------------------------

# kernel, stride, padding, dilation, ceil_mode, input size
MAX_POOLS = [
    ((2, 2), (2, 2), (0, 0), (1, 1), False, (6, 8)),
    ((2, 2), (2, 2), (0, 0), (1, 1), True, (7, 9)),
    ((3, 3), (2, 2), (1, 1), (1, 1), False, (7, 8)),
    ((3, 3), (2, 2), (1, 1), (1, 1), True, (8, 8)),
    ((3, 2), (1, 3), (1, 0), (2, 1), False, (9, 8)),
    ((2, 3), (3, 1), (1, 1), (3, 2), True, (9, 11)),
    ((5, 5), (5, 5), (0, 0), (1, 1), False, (5, 5)),
    ((15, 16), (1, 1), (0, 0), (1, 1), False, (16, 17)),
]


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("pool", MAX_POOLS, ids=str)
def test_max_pool2d(pool: Any, batch: int) -> None:
    *window, ceil_mode, size = pool
    x = torch.randn(batch, 4, *size, dtype=torch.float64, requires_grad=True)
    want = F.max_pool2d(x, *window, ceil_mode=ceil_mode)
    with torch.no_grad():
        y, argmax = reference.max_pool2d(x, *window, ceil_mode)
    assert argmax.dtype == torch.uint8 and argmax.stride() == feature_major_strides(y.shape)
    check_activation(y, want)
    grad = torch.randn_like(want)
    (dx,) = torch.autograd.grad(want, x, grad)
    check_activation(reference.max_pool2d_backward(grad, argmax, *size, *window), dx)


def test_max_pool2d_ties_go_to_the_first_tap() -> None:
    _, argmax = reference.max_pool2d(torch.zeros(1, 1, 4, 4), (2, 2), (2, 2), (0, 0), (1, 1), False)
    assert not argmax.any()
    _, argmax = reference.max_pool2d(torch.zeros(1, 1, 2, 2), (3, 3), (2, 2), (1, 1), (1, 1), False)
    assert argmax.item() == 4  # the padding is no candidate


def test_max_pool2d_refuses_windows_beyond_uint8() -> None:
    with pytest.raises(ValueError, match="at most 256 taps"):
        reference.max_pool2d(torch.zeros(1, 1, 20, 20), (17, 16), (1, 1), (0, 0), (1, 1), False)


# kernel, stride, padding, ceil_mode, count_include_pad, divisor_override, input size
AVG_POOLS = [
    ((2, 2), (2, 2), (0, 0), False, True, None, (6, 8)),
    ((2, 2), (2, 2), (0, 0), True, True, None, (7, 9)),
    ((3, 3), (2, 2), (1, 1), False, True, None, (7, 8)),
    ((3, 3), (2, 2), (1, 1), True, False, None, (8, 8)),
    ((3, 2), (1, 3), (1, 0), False, False, None, (9, 8)),
    ((3, 3), (2, 1), (1, 1), True, True, 5, (8, 7)),
    ((8, 8), (8, 8), (0, 0), False, True, None, (8, 8)),
]


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("pool", AVG_POOLS, ids=str)
def test_avg_pool2d(pool: Any, batch: int) -> None:
    *window, size = pool
    x = torch.randn(batch, 4, *size, dtype=torch.float64, requires_grad=True)
    want = F.avg_pool2d(x, *window)
    check_activation(reference.avg_pool2d(x.detach(), *window), want)
    grad = torch.randn_like(want)
    (dx,) = torch.autograd.grad(want, x, grad)
    check_activation(reference.avg_pool2d_backward(grad, *size, *window), dx)


@pytest.mark.parametrize("dtype", HALVES)
def test_pools_keep_half_types(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 6, 6).to(dtype)
    y, _ = reference.max_pool2d(x, (2, 2), (2, 2), (0, 0), (1, 1), False)
    assert y.dtype == dtype and torch.equal(y, F.max_pool2d(x.float(), 2).to(dtype))
    mean = reference.avg_pool2d(x, (2, 2), (2, 2), (0, 0), False, True, None)
    assert mean.dtype == dtype and torch.equal(mean, F.avg_pool2d(x.float(), 2).to(dtype))


def test_supports_everything() -> None:
    assert reference.supports("linear", torch.zeros(1), None) is None
    assert reference.supports("conv2d", torch.zeros(1, dtype=torch.half), torch.zeros(1)) is None


# -- the measures themselves -----------------------------------------------------------------------


def test_relative_error_and_tolerance() -> None:
    one = torch.ones(4)
    assert relative_error(one, one) == 0
    assert relative_error(one * 1.5, one) == 0.5
    assert relative_error(one * float("nan"), one) == float("inf")
    assert relative_error(one, one * 0) == float("inf")
    assert relative_error(torch.empty(0), torch.empty(0)) == 0
    with pytest.raises(ValueError, match="expected shape"):
        relative_error(one, one[None])
    with pytest.raises(ValueError, match="reference is not finite"):
        relative_error(one, one * float("nan"))
    assert tolerance(torch.float64, 100) < tolerance(torch.float32, 1)
    assert tolerance(torch.float32, 100) < tolerance(torch.bfloat16, 1) < 0.01


def test_uninitialised_memory_shows() -> None:
    assert bool(torch.empty(1000).isnan().all())
    assert bool(torch.empty_strided((3, 4), (1, 3)).isnan().all())
    assert bool((torch.empty(10, dtype=torch.uint8) == 255).all())


def test_cases_are_distinct_and_reproducible() -> None:
    for table in (LINEAR_CASES, CONV_CASES):
        assert len({case.id for case in table}) == len(table)
    assert list(random_conv_cases(5, 3)) == list(random_conv_cases(5, 3))
    assert list(random_linear_cases(5, 3)) != list(random_linear_cases(5, 4))
