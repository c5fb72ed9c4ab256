"""The nets are those of the paper's code: shapes, number of weights, order of their layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sparse_kernels.workbench import models
from sparse_kernels.workbench.errors import WorkbenchError

# Weights of the linear and convolutional layers, counted by hand from the paper's definitions.
WEIGHTS = {
    "lenet-300-100": 784 * 300 + 300 * 100 + 100 * 10,
    "lenet-5-caffe": 20 * 25 + 50 * 20 * 25 + 800 * 500 + 500 * 10,
    "wide-mlp": 784 * 4096 + 4096 * 4096 + 4096 * 10,
    "vgg16-d": 9
    * (3 * 64 + 64 * 64 + 64 * 128 + 128**2 + 128 * 256 + 2 * 256**2 + 256 * 512 + 5 * 512**2)
    + 2 * 512 * 512
    + 512 * 10,
}


@pytest.mark.parametrize("name", models.NETS)
def test_weights_and_output(name: str) -> None:
    net = models.build(name).train()
    spec = models.spec(name)
    layers = [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert sum(layer.weight.numel() for layer in layers) == WEIGHTS[name]
    assert all(layer.bias is not None for layer in layers)
    out = net(torch.randn(2, *spec.input_shape))
    assert out.shape == (2, 10)
    out.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


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
