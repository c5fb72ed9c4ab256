"""ReLUs and poolings that norms compute: only where it is proven, and given back by densify."""

from __future__ import annotations

import copy

import pytest
import torch
from sparsify_support import actions, compare, masked_twin
from torch import Tensor, nn

from sparse_kernels import nn as snn
from sparse_kernels.nn import SparseConv2d, densify, sparsify


class Residual(nn.Module):
    """A ResNet-like block whose one ReLU serves twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.shortcut = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), self.relu)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def test_shared_relu_is_not_fused() -> None:
    model = Residual()
    dense = copy.deepcopy(model)
    report = sparsify(model, density=0.3)
    assert "fused" not in actions(report).values()
    assert isinstance(model.shortcut[2], nn.ReLU) and model.shortcut[2] is model.relu
    assert [actions(report)[n] for n in ("conv1", "bn1", "shortcut.1")] == [
        "sparsified",
        "replaced",
        "replaced",
    ]
    compare(model, masked_twin(dense, model), torch.randn(3, 8, 6, 6))


def test_relu_with_hooks_or_in_other_containers_is_not_fused() -> None:
    class Own(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[2](self[1](self[0](x)) - 1)

    def layers() -> list[nn.Module]:
        return [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]

    assert "fused" not in actions(sparsify(Own(*layers()))).values()
    assert "fused" not in actions(sparsify(nn.ModuleList(layers()))).values()
    assert "fused" not in actions(sparsify(nn.Sequential(*layers()), fuse=False)).values()
    for hooked in (1, 2):
        model = nn.Sequential(*layers())
        model[hooked].register_forward_hook(lambda *args: None)
        assert "fused" not in actions(sparsify(model)).values()


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(3, 2),
        nn.MaxPool2d(2, 1),
        nn.MaxPool2d(2, padding=1),
        nn.MaxPool2d(2, dilation=2),
        nn.MaxPool2d(2, ceil_mode=True),
        nn.AvgPool2d(2),
    ],
    ids=repr,
)
def test_other_poolings_are_not_fused(pool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), pool)
    dense = copy.deepcopy(model)
    assert actions(sparsify(model, density=0.5))["3"] == "replaced"
    compare(model, masked_twin(dense, model), torch.randn(3, 3, 9, 9))


def test_pooling_is_fused_only_where_its_one_consumer_is_proven() -> None:
    def layers() -> list[nn.Module]:
        return [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d((2, 2))]

    model = nn.Sequential(*layers())
    printed = repr(model)
    assert actions(sparsify(model))["3"] == "fused" and model[1].pool
    assert repr(densify(model)) == printed and not hasattr(model[1], "pool")
    for hooked in (1, 3):
        model = nn.Sequential(*layers())
        model[hooked].register_forward_hook(lambda *args: None)
        assert actions(sparsify(model))["3"] == "replaced" and not model[1].pool
    shared = layers()
    model = nn.Sequential(*shared, nn.Conv2d(4, 4, 3), shared[3])
    assert actions(sparsify(model))["3"] == "replaced"
    assert actions(sparsify(nn.Sequential(*layers()), exclude="3"))["3"] == "skipped"
    between = layers()
    between.insert(3, nn.Dropout(0.5))
    assert actions(sparsify(nn.Sequential(*between)))["4"] == "replaced"


def test_densify_gives_a_norm_built_with_relu_and_pooling_its_modules() -> None:
    norm = snn.BatchNorm2d(4)
    norm.relu = norm.pool = True
    model = nn.Sequential(SparseConv2d(3, 4, 3), norm)
    x = torch.randn(3, 3, 8, 8)
    want = model(x)
    model = densify(model)
    assert [type(m) for m in model[1]] == [nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d]
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5, check_stride=False)
