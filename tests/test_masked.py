"""Dense-masked storage: torch's dense results, gradients only inside the mask, layouts kept."""

from __future__ import annotations

import copy
import io
import weakref

import pytest
import torch
from torch import nn

from sparse_kernels import SparseConv2d, SparseLinear, _load
from sparse_kernels.layout import is_feature_major, to_feature_major, to_image_format
from sparse_kernels.nn import _masked
from sparse_kernels.nn.base import SparseLayer
from sparse_kernels.ops import clear_outside, masked_conv2d

CONVS = [
    dict(kernel_size=3, padding=1),
    dict(kernel_size=1),
    dict(kernel_size=(3, 2), stride=2, groups=2, bias=False),
    dict(kernel_size=2, padding="same"),
    dict(kernel_size=3, padding=2, dilation=2, padding_mode="circular"),
]
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def masked(layer):
    return layer.to_storage_("dense-masked")


def make(options) -> SparseConv2d:
    return masked(SparseConv2d(8, 6, density=0.4, **options))


ORDERS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "feature-major": to_feature_major,
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.fixture(params=["hook", "function"])
def way(request, monkeypatch):
    """Both ways of masking: the hook for small weights, the Function for the others."""
    if request.param == "function":
        monkeypatch.setattr(_masked, "_is_usual", lambda *_: False)
    return request.param


def compare(layer: SparseLayer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and gradients of ``layer`` against its dense twin; output and dx are returned."""
    dense = layer.to_dense()
    a, b = (x.detach().requires_grad_() for _ in range(2))
    y, expected = layer(a), dense(b)
    grad = torch.randn_like(expected)
    layer.zero_grad()
    y.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(y, expected, check_stride=False)
    torch.testing.assert_close(a.grad, b.grad, check_stride=False)
    matrix = layer.weight_to_matrix(dense.weight.grad)
    assert matrix[~layer.mask].any(), "the dense gradient has nothing outside of the mask"
    torch.testing.assert_close(layer.values.grad, matrix.masked_fill(~layer.mask, 0))
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
    assert a.grad is not None
    return y, a.grad


@pytest.mark.parametrize("options", CONVS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("image_format", ["channels_last", "contiguous"])
def test_conv2d_is_torchs(options, order, image_format, way) -> None:
    layer = make(options)
    layer.image_format = image_format
    y, dx = compare(layer, ORDERS[order](torch.randn(5, 8, 7, 6)))
    if order == "feature-major" and layer.padding in ((0, 0), (1, 1)):  # torch's pad changes it
        assert is_feature_major(y) and is_feature_major(dx)
    if order == "contiguous":
        compare(layer, torch.randn(8, 7, 6))
        compare(layer, torch.randn(1, 8, 7, 6))


@pytest.mark.parametrize("order", ["contiguous", "feature-major", "expanded"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_torchs(order, bias, way) -> None:
    layer = masked(SparseLinear(12, 7, bias, density=0.3))
    y, dx = compare(layer, ORDERS[order](torch.randn(5, 12)))
    if order == "feature-major":
        assert is_feature_major(y) and is_feature_major(dx)
    if order == "contiguous":
        compare(layer, torch.randn(12))
        compare(layer, torch.randn(2, 3, 12))


def test_a_gradient_outside_is_zero_even_where_it_is_infinite(way) -> None:
    layer = masked(SparseLinear(4, 3, density=0.5))
    layer(torch.full((2, 4), 1e38)).backward(torch.full((2, 3), 1e38))
    assert layer.values.grad.isinf().sum() == layer.nnz
    assert not layer.values.grad[~layer.mask].any()


def test_the_probe_gets_the_whole_gradient(way) -> None:
    linear = masked(SparseLinear(12, 7, density=0.3))
    for layer, x in [(make(CONVS[0]), torch.randn(3, 8, 5, 5)), (linear, torch.randn(4, 12))]:
        dense = layer.to_dense()
        grad = torch.randn_like(dense(x))
        dense(x).backward(grad)
        whole = layer.weight_to_matrix(dense.weight.grad)
        probe = layer.make_probe()
        layer(x).backward(grad)
        torch.testing.assert_close(probe.grad, whole)
        torch.testing.assert_close(layer.values.grad, whole.masked_fill(~layer.mask, 0))


@pytest.mark.parametrize("order", ["contiguous", "feature-major"])
def test_second_derivatives(order, way) -> None:
    conv = masked(SparseConv2d(2, 3, 2, density=0.6, dtype=torch.float64))
    linear = masked(SparseLinear(4, 3, density=0.6, dtype=torch.float64))
    for layer, shape in ((conv, (2, 2, 3, 3)), (linear, (3, 4))):
        x = ORDERS[order](torch.randn(shape, dtype=torch.float64)).requires_grad_()
        mask = layer.mask
        weight = layer.values.detach().clone().requires_grad_()

        def function(x, weight, layer=layer, mask=mask):
            values = torch.where(mask, weight, 0)
            return torch.func.functional_call(layer, {"values": values}, (x,))

        assert torch.autograd.gradcheck(function, (x, weight))
        assert torch.autograd.gradgradcheck(function, (x, weight))


def test_the_hook_is_on_no_parameter_and_goes_with_the_mask() -> None:
    layer = masked(SparseLinear(6, 5, density=0.4))
    other = layer.values.detach().clone().requires_grad_()
    x = torch.randn(2, 6)
    layer(x).sum().backward()
    torch.func.functional_call(layer, {"values": other}, (x,)).sum().backward()
    assert not layer.values._backward_hooks and not other._backward_hooks
    assert torch.equal(other.grad, layer.values.grad) and not other.grad[~layer.mask].any()
    layer.zero_grad()
    before, y = layer.mask, layer(x)
    layer.mask = ~before  # another mask: the old graph has its own
    layer(x).sum().backward()
    assert not layer.values.grad[before].any() and layer.values.grad[~before].any()
    layer.zero_grad()
    y.sum().backward()
    assert torch.equal(layer.values.grad, other.grad)
    layer.to_storage_("compressed")
    layer(x).sum().backward()


USES = {
    "linear": (lambda: masked(SparseLinear(6, 5, density=0.4)), (4, 6)),
    "without bias": (lambda: masked(SparseLinear(6, 5, False, density=0.4)), (4, 6)),
    "three dimensions": (lambda: masked(SparseLinear(6, 5, density=0.4)), (2, 3, 6)),
    "conv": (lambda: make(CONVS[0]), (2, 8, 5, 5)),
    "1x1": (lambda: make(CONVS[1]), (2, 8, 5, 5)),
}


@pytest.mark.parametrize("image_format", ["channels_last", "contiguous"])
@pytest.mark.parametrize("use", USES)
def test_a_layer_used_twice_and_graphs_used_twice(use, image_format, way) -> None:
    build, shape = USES[use]
    layer = build()
    layer.image_format = image_format
    order = ORDERS[image_format] if len(shape) == 4 else ORDERS["contiguous"]
    a, b = (order(torch.randn(shape)) for _ in range(2))
    once = [torch.autograd.grad((layer(x) ** 2).sum(), layer.values)[0] for x in (a, b)]
    assert all(g.any() and not g[~layer.mask].any() for g in once)
    loss = (layer(a) ** 2).sum() + (layer(b) ** 2).sum()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(layer.values.grad, once[0] + once[1])
    loss.backward()
    torch.testing.assert_close(layer.values.grad, 2 * (once[0] + once[1]))


def test_a_graph_outlives_its_layer(way) -> None:
    layer = masked(SparseLinear(6, 5, density=0.4))
    values, mask, gone = layer.values, layer.mask, weakref.ref(layer)
    y = layer(torch.randn(2, 6))
    del layer
    assert gone() is None, "the graph keeps its layer alive"
    y.sum().backward()
    assert values.grad.any() and not values.grad[~mask].any()


def test_a_missing_gradient_is_no_error(way) -> None:
    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    layer = masked(SparseLinear(6, 5, density=0.4))
    Nothing.apply(layer(torch.randn(2, 6))).sum().backward()
    grad = layer.values.grad  # the Function is handed zeros
    assert grad is None or not grad.any()


def test_copies_and_loaded_layers_mask_too() -> None:
    layer = masked(SparseLinear(6, 5, density=0.4))
    layer(torch.randn(2, 6)).sum().backward()
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        twin.zero_grad()
        twin(torch.randn(2, 6)).sum().backward()
        assert twin.values.grad.any() and not twin.values.grad[~twin.mask].any()


def test_nobody_elses_gradient_is_touched() -> None:
    """values + other hands ONE gradient tensor to both; what masks in place must not see it."""
    layer = masked(SparseLinear(6, 5, density=0.4))
    other = nn.Parameter(torch.zeros(5, 6))
    seen: list[torch.Tensor] = []
    layer.values.register_hook(seen.append)
    weight = layer.dense_matrix() + other  # the differentiable weight, whose gradient is masked
    (weight * torch.ones(5, 6)).sum().backward()
    assert torch.equal(other.grad, torch.ones(5, 6))
    assert torch.equal(layer.values.grad, layer.mask.float())
    # Together with the layer itself: its share is masked, the others' gradients are theirs.
    layer.zero_grad()
    x = torch.randn(2, 6)
    (layer(x).sum() + ((layer.values + other) * torch.ones(5, 6)).sum()).backward()
    assert torch.equal(other.grad, torch.full((5, 6), 2.0))
    expected = torch.where(layer.mask, x.sum(0).expand(5, 6), 0) + 1
    torch.testing.assert_close(layer.values.grad, expected)
    torch.testing.assert_close(seen[-1], expected)


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (40, 1000), (257, 300)])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_clear_outside(size, threads) -> None:
    native = _load.native()
    grad = torch.randn(size)
    grad.view(-1)[0] = float("nan")
    mask = torch.rand(size) < 0.4
    expected = grad.masked_fill(~mask, 0)
    before = grad.clone()
    torch.testing.assert_close(clear_outside(grad, mask), expected, equal_nan=True)
    torch.testing.assert_close(grad, before, equal_nan=True)
    native.clear_outside(grad.data_ptr(), grad.data_ptr(), mask.data_ptr(), grad.numel(), threads)
    torch.testing.assert_close(grad, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 9, 16), (5, 25, 3), (2, 64, 70)])
def test_transpose_each(shape) -> None:
    source = torch.randn(shape)
    out = torch.full((shape[0], shape[2], shape[1]), float("nan"))
    _load.native().transpose_each(out.data_ptr(), source.data_ptr(), *shape, 2)
    assert torch.equal(out, source.transpose(1, 2))


def test_native_arguments_are_checked() -> None:
    native = _load.native()
    a = torch.zeros(4).data_ptr()
    with pytest.raises(ValueError, match="clear_outside: mask must not be null"):
        native.clear_outside(a, a, 0, 4, 1)
    with pytest.raises(ValueError, match="clear_outside: threads"):
        native.clear_outside(a, a, a, 4, 0)
    with pytest.raises(ValueError, match="transpose_each: rows must be at least 0"):
        native.transpose_each(a, a, 1, -1, 2, 1)


def test_to_image_format() -> None:
    x = torch.randn(5, 3, 4, 6)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        for order in ORDERS.values():
            got = to_image_format(order(x), memory_format)
            assert got.is_contiguous(memory_format=memory_format)
            assert torch.equal(got, order(x))


def test_an_unknown_format_is_refused() -> None:
    layer = make(CONVS[0])
    with pytest.raises(ValueError, match="image_format must be one of channels_last, contiguous"):
        masked_conv2d(
            torch.randn(1, 8, 4, 4),
            layer.values,
            layer.mask,
            None,
            geometry=layer.geometry,
            image_format="nhwc",
        )


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("order", ["contiguous", "feature-major"])
@pytest.mark.parametrize("image_format", ["channels_last", "contiguous"])
def test_compiled_layers_equal_eager_ones(order, image_format) -> None:
    for layer, shape in ((make(CONVS[0]), (3, 8, 5, 4)), (masked(SparseLinear(12, 7)), (5, 12))):
        torch._dynamo.reset()
        layer.image_format = image_format
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = ORDERS[order](torch.randn(shape))
        results = []
        for call in (layer, compiled):
            layer.zero_grad()
            leaf = x.detach().requires_grad_()
            y = call(leaf)
            (y * torch.arange(y.numel()).view(y.shape)).sum().backward()
            results.append((y, leaf.grad, layer.values.grad, layer.bias.grad))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, check_stride=False)


@pytest.mark.parametrize("batched", [False, True])
def test_a_single_image_with_a_free_batch_stride(batched: bool) -> None:
    """torch 2.13 reads that stride in float64 with groups, and is wrong (see hostile_calls)."""
    options = {"groups": 2, "padding": 1, "density": 0.9, "dtype": torch.float64}
    layer = SparseConv2d(4, 2, (1, 2), **options).to_storage_("dense-masked")
    x = torch.randn(1, 2, 4, dtype=torch.float64).permute(2, 0, 1)  # strides (1, 8, 4)
    plain = x.contiguous()
    if batched:
        x, plain = x.unsqueeze(0), plain.unsqueeze(0)
    grad = torch.randn_like(layer(plain)).contiguous()
    found = torch.autograd.grad(layer(x), layer.values, grad)[0]
    dense = layer.to_dense()
    right = torch.autograd.grad(dense(plain), dense.weight, grad)[0]
    torch.testing.assert_close(found, layer.weight_to_matrix(right) * layer.mask)
