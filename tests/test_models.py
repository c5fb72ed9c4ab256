"""The nets are those of the paper's code: shapes, number of weights, order of their layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparse_kernels import layout
from sparse_kernels.nn import sparsify
from sparse_kernels.workbench import models
from sparse_kernels.workbench.bench import nets
from sparse_kernels.workbench.errors import WorkbenchError
from sparse_kernels.workbench.models import resnet, wrn

_VGG_FEATURES = 9 * (
    3 * 64 + 64 * 64 + 64 * 128 + 128**2 + 128 * 256 + 2 * 256**2 + 256 * 512 + 5 * 512**2
)
_ALEX_FEATURES = 3 * 96 * 121 + 96 * 256 * 25 + 9 * (256 * 384 + 384 * 384 + 384 * 256)


def _wrn(depth: int, widen: int) -> int:
    blocks, total, channels = (depth - 4) // 6, 9 * 3 * 16, 16
    for width in (16 * widen, 32 * widen, 64 * widen):
        total += 9 * channels * width + channels * width  # first convolution and shortcut
        total += 9 * width * width * (2 * blocks - 1)
        channels = width
    return total + channels * 10


def _resnet50() -> int:
    total, channels = 3 * 64 * 49, 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        out = 4 * width
        total += channels * width + channels * out  # of the first block: first 1x1 and shortcut
        total += (blocks - 1) * out * width + blocks * (9 * width * width + width * out)
        channels = out
    return total + channels * 1000


# Parameters as the papers state them, in millions: norms and biases included.
PUBLISHED = {
    "wrn-16-8": 11.0, "wrn-22-8": 17.2, "wrn-28-2": 1.5, "wrn-16-10": 17.1,
    "vgg16-d": 15.2, "vgg16-like": 15.0, "alexnet-s": 5.1, "alexnet-b": 8.5, "resnet-50": 25.6,
}  # fmt: skip

# Weights of the linear and convolutional layers, counted by hand from the paper's definitions.
WEIGHTS = {
    "lenet-300-100": 784 * 300 + 300 * 100 + 100 * 10,
    "lenet-5-caffe": 20 * 25 + 50 * 20 * 25 + 800 * 500 + 500 * 10,
    "wide-mlp": 784 * 4096 + 4096 * 4096 + 4096 * 10,
    "vgg16-d": _VGG_FEATURES + 2 * 512 * 512 + 512 * 10,
    "vgg16-like": _VGG_FEATURES + 512 * 512 + 512 * 10,
    "vgg16-c": _VGG_FEATURES - 8 * (256**2 + 2 * 512**2) + 2048 * 512 + 512 * 512 + 512 * 10,
    "alexnet-s": _ALEX_FEATURES + 256 * 1024 + 1024**2 + 1024 * 10,
    "alexnet-b": _ALEX_FEATURES + 256 * 2048 + 2048**2 + 2048 * 10,
    "wrn-16-8": _wrn(16, 8),
    "wrn-22-8": _wrn(22, 8),
    "wrn-28-2": _wrn(28, 2),
    "wrn-16-10": _wrn(16, 10),
    "resnet-50": _resnet50(),
}


@pytest.mark.parametrize("name", models.NETS)
def test_weights_and_output(name: str) -> None:
    net = models.build(name).train()
    spec = models.spec(name)
    layers = [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert sum(layer.weight.numel() for layer in layers) == WEIGHTS[name]
    biased = [
        m for m in layers if isinstance(m, nn.Linear) or not name.startswith(("wrn", "resnet"))
    ]
    assert all((layer.bias is not None) == (layer in biased) for layer in layers)
    out = net(torch.randn(2, *spec.input_shape))
    assert out.shape == (2, 1000 if spec.kind == "imagenet" else 10)
    out.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name: str) -> None:
    count = sum(p.numel() for p in models.build(name).parameters())
    assert round(count / 1e6, 1) == pytest.approx(PUBLISHED[name], abs=0.11)


def test_a_wide_block_computes_what_the_official_forward_does() -> None:
    torch.manual_seed(0)
    block = wrn.WideBlock(8, 16, 2, 0.3).train()
    x = torch.randn(4, 8, 6, 6)
    norm1, norm2, conv2 = block.first[0], block.second[0], block.second[3]
    torch.manual_seed(1)
    out = torch.relu(norm1(x))
    h = block.conv1(out)
    h = conv2(nn.functional.dropout(torch.relu(norm2(h)), 0.3, True))
    expected = block.shortcut(out) + h
    torch.manual_seed(1)
    torch.testing.assert_close(block(x), expected)
    same = wrn.WideBlock(8, 8, 1, 0.0).eval()
    assert same.shortcut is None and not any(isinstance(m, nn.Dropout) for m in same.modules())
    with torch.no_grad():
        same.second[2].weight.zero_()
    torch.testing.assert_close(same(x), x)  # the sum takes the block's input, not the active one


def test_wide_resnets_are_fused_and_keep_the_layout() -> None:
    net = models.build("wrn-28-2")
    report = sparsify(net, density=0.1, generator=torch.Generator().manual_seed(0))
    fused = [row for row in report.rows if row.action == "fused"]
    assert len(fused) == 2 * 12 + 1  # two in each block, and the last norm
    layout.reset_conversions()
    net(torch.randn(2, 3, 32, 32)).sum().backward()
    # The images on the way in, the expanded gradient of the sum: nothing in between.
    assert layout.conversions() <= 3


def test_a_bottleneck_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    block = resnet.Bottleneck(8, 4, 2).train()
    x = torch.randn(4, 8, 6, 6)
    conv1, norm1, _, conv2, norm2, _, conv3, norm3 = block.body
    assert (conv1.stride, conv2.stride, conv3.stride) == ((1, 1), (2, 2), (1, 1))
    y = torch.relu(norm2(conv2(torch.relu(norm1(conv1(x))))))
    shortcut, norm = block.shortcut
    expected = torch.relu(norm3(conv3(y)) + norm(shortcut(x)))
    torch.testing.assert_close(block(x), expected)
    same = resnet.Bottleneck(16, 4, 1)
    assert same.shortcut is None
    torch.nn.init.zeros_(same.body[-1].weight)
    torch.testing.assert_close(same(x.repeat(1, 2, 1, 1)), torch.relu(x.repeat(1, 2, 1, 1)))


@pytest.mark.slow
def test_resnet50_sparse_equals_its_masked_dense_form() -> None:
    net = models.build("resnet-50", num_classes=10)
    report = sparsify(net, density=0.2, generator=torch.Generator().manual_seed(0))
    assert len([row for row in report.rows if row.action == "fused"]) == 33
    images = torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    # Every layer on the input and gradient that it meets in the net, then the net as a whole.
    errors = nets.check_net(net, (images, torch.arange(4)))
    assert errors["logits"] < 1e-3


def test_wrong_depths_are_named() -> None:
    with pytest.raises(WorkbenchError, match="6 n \\+ 4"):
        models.wide_resnet(17, 8)


def test_vgg_has_norm_before_relu_in_features_and_after_it_in_the_classifier() -> None:
    features, _, classifier = models.vgg16_d()
    convolutions = [i for i, m in enumerate(features) if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 13
    for i in convolutions:
        assert isinstance(features[i + 1], nn.BatchNorm2d)
        assert isinstance(features[i + 2], nn.ReLU)
    assert [type(m).__name__ for m in classifier] == [
        "Linear", "ReLU", "BatchNorm1d", "Linear", "ReLU", "BatchNorm1d", "Linear",
    ]  # fmt: skip
    assert sum(isinstance(m, nn.MaxPool2d) for m in features) == 5


def test_lenet5_computes_what_the_official_forward_does() -> None:
    torch.manual_seed(0)
    net = models.lenet5_caffe()
    conv1, conv2, fc3, fc4 = net[0], net[3], net[7], net[9]
    x = torch.randn(3, 1, 28, 28)
    h = nn.functional.max_pool2d(torch.relu(conv1(x)), 2)
    h = nn.functional.max_pool2d(torch.relu(conv2(h)), 2)
    h = torch.relu(fc3(h.reshape(-1, 50 * 4 * 4)))
    torch.testing.assert_close(net(x), fc4(h))


def test_the_width_of_the_mlp_is_configurable() -> None:
    net = models.build("wide-mlp", width=64, hidden_layers=3)
    shapes = [tuple(m.weight.shape) for m in net if isinstance(m, nn.Linear)]
    assert shapes == [(64, 784), (64, 64), (64, 64), (10, 64)]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet", {}, "unknown net 'resnet'.*lenet-300-100"),
        ("lenet-300-100", {"width": 10}, "lenet-300-100.*width"),
        ("wide-mlp", {"width": 0}, "at least 1"),
        ("wide-mlp", {"width": 10**7}, "cannot be built.*memory.*--width"),
        ("wide-mlp", {"width": 10**12}, "cannot be built.*--width"),
    ],
)
def test_wrong_requests_are_named(name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(WorkbenchError, match=message):
        models.build(name, **options)


def test_equal_seeds_build_equal_nets() -> None:
    nets = []
    for _ in range(2):
        torch.manual_seed(4)
        nets.append(models.build("lenet-300-100"))
    for one, two in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, two)
