"""What the hostile calls found (tests/hostile_calls.py), each as it can be told in a few lines."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sparse_kernels.nn import DENSE_MASKED, SparseConv2d, SparseLayer, SparseLinear
from sparse_kernels.training.rewrite import rewrite


def _half_full(dtype: torch.dtype = torch.float32) -> SparseLinear:
    generator = torch.Generator().manual_seed(3)
    return SparseLinear(6, 5, density=0.5, generator=generator, dtype=dtype)


def _everything(layer: SparseLayer) -> None:
    rewrite(layer, None, torch.arange(30))  # outgrows the capacity: values get new memory


def _loaded(layer: SparseLayer) -> None:
    other = SparseLinear(6, 5, density=1.0)
    layer.load_state_dict(other.to(layer.values.dtype).state_dict(), assign=True)


CHANGES: dict[str, Callable[[SparseLayer], object]] = {
    "another storage": lambda layer: layer.to_storage_(DENSE_MASKED),
    "more capacity": _everything,
    "another dtype": lambda layer: layer.to(torch.float16),
    "a state_dict's own tensors": _loaded,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("change", CHANGES)
def test_values_with_new_memory_are_refused_by_an_older_product(
    change: str, dtype: torch.dtype
) -> None:
    layer = _half_full(dtype)
    x = torch.ones(3, 6, dtype=dtype, requires_grad=True)
    y = layer(x)
    CHANGES[change](layer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), x)


def test_values_rewritten_in_place_are_refused_by_an_older_product() -> None:
    layer = _half_full().to_storage_(DENSE_MASKED)
    x = torch.ones(3, 6, requires_grad=True)
    y = layer(x)
    rewrite(layer, None, torch.arange(4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), x)


def test_values_replaced_by_the_user_are_never_read_by_their_old_shape() -> None:
    layer = _half_full()
    x = torch.ones(3, 6, requires_grad=True)
    y = layer(x)
    layer.values.data = torch.zeros(1, 1, 1)
    with pytest.raises(RuntimeError, match=r"expected \[15, 1, 1\] in float32, got \[1, 1, 1\]"):
        torch.autograd.grad(y.sum(), x)


def test_a_change_without_new_memory_is_still_refused_or_right() -> None:
    layer = _half_full()
    x = torch.ones(3, 6, requires_grad=True)
    y = layer(x)
    want = layer.weight.detach().sum(0).expand(3, 6)
    layer.to(torch.float32)  # moves nothing: the product goes on
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.Tensor(want))


@pytest.mark.parametrize("bias", [False, True])
def test_a_dense_masked_layer_on_the_meta_device_takes_no_real_input(bias: bool) -> None:
    """torch.mm of a real and a meta matrix gives memory that nobody wrote."""
    layer = SparseLinear(6, 5, bias=bias, density=0.5).to_storage_(DENSE_MASKED)
    with pytest.raises(ValueError, match="expected an input on cpu, got meta"):
        layer(torch.ones(3, 6, device="meta"))
    layer.to("meta")
    with pytest.raises(ValueError, match="expected an input on meta, got cpu"):
        layer(torch.ones(3, 6))
    assert layer(torch.ones(3, 6, device="meta")).shape == (3, 5)


@pytest.mark.parametrize("image_format", ["channels_last", "contiguous"])
@pytest.mark.parametrize("expanded", [0, 1, 2])
def test_gradient_of_an_expanded_image_through_groups(expanded: int, image_format: str) -> None:
    """A single image whose memory stands for several channels or pixels."""
    layer = SparseConv2d(4, 6, (3, 1), padding=1, groups=2, density=0.5, dtype=torch.float64)
    layer.image_format = image_format
    layer.to_storage_(DENSE_MASKED)
    dense = layer.to_dense()
    x = torch.randn(4, 5, 7, dtype=torch.float64).narrow(expanded, 0, 1).expand(4, 5, 7)
    grads = []
    for module, image in ((layer, x), (dense, x.contiguous())):
        image = image.detach().requires_grad_()
        y = module(image)
        weights = torch.arange(float(y.numel()), dtype=torch.float64).view(y.shape)
        grads.append(torch.autograd.grad(y, image, weights)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("image_format", ["channels_last", "contiguous"])
def test_one_image_one_pixel_wide_through_groups_and_dilation(image_format: str) -> None:
    """torch 2.13's own convolution ends the process here with channels_last memory."""
    layer = SparseConv2d(12, 14, (3, 1), stride=2, padding=1, dilation=2, groups=2, density=0.5)
    layer.image_format = image_format
    layer.to_storage_(DENSE_MASKED)
    for batch in (1, 2):
        x = torch.randn(batch, 12, 5, 1)
        # The dense layer's own dilation of one tap would end the process, in float32.
        expected = layer.to_dense().double()(x.double())
        for image in (x, x.contiguous(memory_format=torch.channels_last)):
            torch.testing.assert_close(layer(image).double(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_free_strides_of_narrow_images_through_groups(dtype: torch.dtype) -> None:
    """The stride of a side of 1 says nothing; torch 2.13 reads it in the weight's gradient."""
    layer = SparseConv2d(16, 4, (1, 2), 2, 1, groups=2, density=0.5, dtype=dtype)
    layer.to_storage_(DENSE_MASKED)
    dense = layer.to_dense().double()
    x = torch.randn(8, 16, 6, 1, dtype=dtype)
    narrow = torch.empty_strided(x.shape, (96, 1, 16, 768), dtype=dtype).copy_(x)
    dense(x.double()).sum().backward()
    expected = layer.weight_to_matrix(dense.weight.grad) * layer.mask
    for probe in (False, True):
        layer.probe = None
        if probe:
            layer.make_probe()
        (found,) = torch.autograd.grad(layer(narrow).sum(), layer.values)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
