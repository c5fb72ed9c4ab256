"""What the hostile calls found (tests/hostile_calls.py), each as it can be told in a few lines."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hostile_model import convolution, dense_output

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


def _near_the_model(layer: SparseConv2d, x: torch.Tensor) -> None:
    """Output and gradients against the products of hostile_model.py in float64."""
    plain = x.detach().double().contiguous().requires_grad_()
    weight = layer.weight.detach().as_subclass(torch.Tensor).double().clone().requires_grad_()
    bias = None if layer.bias is None else layer.bias.detach().double()
    want = dense_output(layer, plain, weight, bias)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(want.shape, generator=generator, dtype=torch.float64)
    dx, dw = torch.autograd.grad(want, (plain, weight), grad)
    image = x.detach().requires_grad_()
    y = layer(image)
    torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=1e-4)
    found = torch.autograd.grad(y, (image, layer.values), grad.to(x.dtype))
    expected = dx, layer.weight_to_matrix(dw) * layer.mask
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


#: Kernel, stride, padding, dilation and width of an image of which no window sees a column.
UNSEEN = [((2, 2), 2, 3, 2, 1), ((1, 3), 2, 5, 2, 1), ((2, 2), 3, 4, 3, 2), ((3, 2), 4, 5, 4, 3)]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("image_format", ["channels_last", "contiguous"])
@pytest.mark.parametrize("shape", UNSEEN)
def test_windows_that_see_nothing_but_padding(
    shape: tuple[tuple[int, int], int, int, int, int], image_format: str, groups: int
) -> None:
    """Games 2776 and 3336: torch 2.13's own convolution ends the process in channels_last."""
    kernel, stride, padding, dilation, width = shape
    layer = SparseConv2d(
        6, 8, kernel, stride, padding, dilation, groups, density=0.5, block=(1, 1)
    )  # fmt: skip
    layer.image_format = image_format
    layer.to_storage_(DENSE_MASKED)
    x = torch.randn(5, 6, 7, width)
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        _near_the_model(layer, image)
        _near_the_model(layer, image[:1])
        layer.make_probe()
        _near_the_model(layer, image)
        layer.probe = None


@pytest.mark.parametrize("width", [4, 5])
def test_dilated_images_that_windows_see_are_not_padded(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A usual dilated layer goes to torch's convolution as it is, without a copy."""

    def pad(*arguments: object, **options: object) -> None:
        raise AssertionError("padded")

    layer = SparseConv2d(6, 8, 3, padding=4, dilation=4, density=0.5).to_storage_(DENSE_MASKED)
    monkeypatch.setattr(torch.nn.functional, "pad", pad)
    assert layer(torch.randn(2, 6, 5, width)).shape == (2, 8, 5, width)
    layer.make_probe()
    assert layer(torch.randn(2, 6, 5, width)).shape == (2, 8, 5, width)


@pytest.mark.parametrize("kernel", [(1, 3), (1, 1), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape, strides", [
    ((1, 6, 1, 5), (1, 1, 6, 6)),
    ((1, 6, 4, 3), (1, 1, 18, 6)),
    ((8, 6, 8, 1), (48, 8, 1, 1)),
    ((3, 6, 3, 1), (18, 1, 6, 768)),
])  # fmt: skip
def test_second_derivatives_through_groups(
    kernel: tuple[int, int], dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    """Games 2500, 2546 and 3673 in torch's own terms; with create_graph the strides are the user's.

    There the weight is contiguous: with one in channels_last torch 2.13 forms a wrong gradient.
    """
    layer = SparseConv2d(6, 4, kernel, padding=1, groups=2, density=0.7, dtype=dtype)
    layer.to_storage_(DENSE_MASKED)
    numbers = torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(2))
    x = torch.empty_strided(shape, strides, dtype=dtype).copy_(numbers)
    _near_the_model(layer, x)
    found = torch.autograd.grad(layer(x.requires_grad_()).pow(2).sum(), layer.values,
                                create_graph=True)[0]  # fmt: skip
    plain = x.detach().double().contiguous()
    weight = layer.weight.detach().as_subclass(torch.Tensor).double().requires_grad_()
    want = dense_output(layer, plain, weight, layer.bias.detach().double()).pow(2).sum()
    (dw,) = torch.autograd.grad(want, weight)
    expected = layer.weight_to_matrix(dw) * layer.mask
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


def test_the_model_does_not_read_free_strides() -> None:
    """Game 2500, the smallest form: here torch 2.13's convolution forms a wrong gradient."""
    x = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    grads = []
    for strides in ((1, 4, 4), (2, 2, 1)):
        image = torch.empty_strided((4, 1, 2), strides, dtype=torch.float64).copy_(x.t()[:, None])
        weight = torch.ones(2, 1, 1, 2, dtype=torch.float64).permute(0, 3, 1, 2).requires_grad_()
        y = convolution(image, weight, None, (1, 1), (1, 1), 2)
        grads.append(torch.autograd.grad(y.square().sum(), weight)[0])
    torch.testing.assert_close(*grads)
    flat = grads[0].flatten()
    expected = torch.stack([2 * (x[:, 2 * g : 2 * g + 2] * x[:, 2 * g : 2 * g + 2].sum(1, True))
                            .sum(0) for g in (0, 1)]).flatten()  # fmt: skip
    torch.testing.assert_close(flat, expected)


@pytest.mark.parametrize("image_format", ["channels_last", "contiguous"])
@pytest.mark.parametrize("padding", [0, 1])
def test_one_tap_with_stride_over_few_channels(padding: int, image_format: str) -> None:
    """Game 2073: torch 2.13 writes past the weight's gradient, and ends later."""
    layer = SparseConv2d(4, 7, 1, 2, padding, density=0.5).to_storage_(DENSE_MASKED)
    layer.image_format = image_format
    asked = []
    convolution_of_torch = torch.conv2d

    def conv2d(*arguments: object) -> torch.Tensor:
        asked.append(arguments[3])
        return convolution_of_torch(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "conv2d", conv2d)
        patch.setattr(torch.nn.functional, "conv2d", conv2d)
        for shape in ((9, 4, 8, 6), (5, 4, 5, 4), (1, 4, 7, 1), (4, 6, 6)):
            x = torch.randn(shape)
            _near_the_model(layer, x)
            if x.dim() == 4:
                _near_the_model(layer, x.contiguous(memory_format=torch.channels_last))
    assert {tuple(stride) for stride in asked} == {(1, 1)}
