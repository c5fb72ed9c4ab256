"""Layers and sparsified models under torch.compile and through mask updates."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from sparse_kernels.nn import SparseLinear, sparsify

# Dynamo itself instantiates autograd Functions and warns of that.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.mark.parametrize("storage", ["compressed", "dense-masked"])
def test_compiled_layer_follows_mask_updates_without_recompiling(storage) -> None:
    torch._dynamo.reset()
    layer = SparseLinear(12, 9, density=0.3).to_storage_(storage)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    nnzb = layer.pattern.nnzb
    x = torch.randn(5, 12)
    for seed in range(12):
        draw = torch.randperm(108, generator=torch.Generator().manual_seed(seed))[:nnzb]
        layer.set_pattern_(draw.sort().values)
        layer._zero_outside()
        layer.zero_grad()
        y = compiled(x)
        y.sum().backward()
        gradient = layer.values.grad.clone()
        layer.zero_grad()
        expected = layer(x)
        expected.sum().backward()
        torch.testing.assert_close(y, expected, check_stride=False)
        torch.testing.assert_close(gradient, layer.values.grad)
    assert counter.frame_count <= 2


def test_compiled_convnet_equals_eager() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 4, 3),
        nn.AvgPool2d(2),
    )
    sparsify(model, density=0.4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 3, 10, 10)
    torch.testing.assert_close(compiled(x), model(x), check_stride=False)
