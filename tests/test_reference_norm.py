"""Batch norm of the reference backend against torch's own, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import relative_error

from sparse_kernels.backends import reference
from sparse_kernels.layout import feature_major_strides

TIGHT = 1e-12


def check(out: torch.Tensor, ref: torch.Tensor, bound: float = TIGHT) -> None:
    assert relative_error(out, ref) <= bound


def check_activation(out: torch.Tensor, ref: torch.Tensor, bound: float = TIGHT) -> None:
    assert out.stride() == feature_major_strides(out.shape)
    check(out, ref, bound)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(7, 5), (4, 3, 5, 2)])
def test_batch_norm(
    shape: tuple[int, ...], training: bool, relu: bool, residual: bool, affine: bool
) -> None:
    x = torch.randn(shape, dtype=torch.float64) * 3 + 2
    channels, eps = shape[1], 1e-3
    weight = torch.randn(channels, dtype=torch.float64) if affine else None
    bias = torch.randn(channels, dtype=torch.float64) if affine else None
    running = (torch.randn(channels).double(), torch.rand(channels).double() + 0.5)
    given = (None, None) if training else running
    left = torch.randn(shape, dtype=torch.float64) if residual else None
    leaves = [t for t in (x, weight, bias, left) if t is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    want = F.batch_norm(x, *given, weight, bias, training, 0.1, eps)
    want = want if left is None else want + left
    want = want.relu() if relu else want

    with torch.no_grad():
        y, mean, var, offset = reference.batch_norm(
            x, weight, bias, *given, training, eps, relu, left
        )
    check_activation(y, want)
    dims = [0, *range(2, len(shape))]
    check(mean, x.mean(dims) if training else running[0])
    check(var, x.var(dims, correction=0) if training else running[1])
    grad = torch.randn(shape, dtype=torch.float64)
    expected = dict(zip(map(id, leaves), torch.autograd.grad(want, leaves, grad), strict=True))
    with torch.no_grad():
        kept = y if residual else None
        got = reference.batch_norm_backward(
            grad, x, kept, weight, mean, var, offset, training, eps, relu, residual
        )
    check_activation(got[0], expected[id(x)], 1e-10)
    if affine:
        check(got[1], expected[id(weight)])
        check(got[2], expected[id(bias)])
    if left is not None:
        check_activation(got[3], expected[id(left)])
    else:
        assert got[3].numel() == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(6, 4), (5, 7)])
def test_batch_norm_pool(size: tuple[int, int], training: bool) -> None:
    x = (torch.randn(3, 4, *size, dtype=torch.float64) * 3 + 2).requires_grad_()
    weight, bias = torch.randn(2, 4, dtype=torch.float64).unbind()
    leaves = [x, weight.requires_grad_(), bias.requires_grad_()]
    running = (torch.randn(4).double(), torch.rand(4).double() + 0.5)
    given = (None, None) if training else running
    normed = F.batch_norm(x, *given, weight, bias, training, 0.1, 1e-3)
    want = F.max_pool2d(normed.relu(), 2)
    with torch.no_grad():
        y, argmax, mean, var, rounding = reference.batch_norm_pool(
            x, weight, bias, *given, training, 1e-3
        )
    check_activation(y, want)
    assert torch.equal(argmax == 255, want == 0) and not rounding.any()
    grad = torch.randn(want.shape, dtype=torch.float64)
    expected = torch.autograd.grad(want, leaves, grad)
    with torch.no_grad():
        got = reference.batch_norm_pool_backward(
            grad, argmax, x, weight, mean, var, rounding, training, 1e-3
        )
    check_activation(got[0], expected[0], 1e-10)
    check(got[1], expected[1])
    check(got[2], expected[2])


def test_batch_norm_does_not_alias_its_statistics() -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    out = reference.batch_norm(torch.randn(2, 3), None, None, mean, var, False, 0.1, False, None)
    assert torch.equal(out[1], mean) and out[1].data_ptr() != mean.data_ptr()
    assert torch.equal(out[2], var) and out[2].data_ptr() != var.data_ptr()


def test_batch_norm_needs_statistics_to_evaluate() -> None:
    with pytest.raises(ValueError, match="expected mean and var outside of training"):
        reference.batch_norm(torch.randn(2, 3), None, None, None, None, False, 0.1, False, None)


def test_batch_norm_backward_needs_the_mask() -> None:
    x, v = torch.randn(2, 3), torch.ones(3)
    with pytest.raises(ValueError, match="expected y or offset, got neither"):
        reference.batch_norm_backward(x, x, None, None, v, v, None, True, 0.1, True, False)


def test_batch_norm_of_an_empty_batch() -> None:
    x = torch.empty(0, 3, 2, 2)
    mean, var = torch.zeros(3), torch.ones(3)
    y, *_ = reference.batch_norm(x, None, None, mean, var, False, 0.1, True, None)
    assert y.shape == x.shape
    dx, dweight, dbias, _ = reference.batch_norm_backward(
        x, x, y, mean, mean, var, None, True, 0.1, True, False
    )
    assert dx.shape == x.shape
    assert not dweight.any() and not dbias.any()
