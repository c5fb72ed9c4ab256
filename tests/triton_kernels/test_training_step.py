"""Whole training steps of a small net on Triton and torch alone, held against the CPU's kernels.

Forward, backward, growth window, optimizer and mask updates. Interpreted on tensors of the CPU, or
compiled on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from float64_parity import DEVICE
from interpreter_support import HOW, INTERPRETING
from torch import nn

from sparse_kernels import SparseMomentum, plan
from sparse_kernels.backends import torch_ops
from sparse_kernels.backends import triton as backend
from sparse_kernels.nn import sparsify
from sparse_kernels.training.layers import sparse_layers

pytestmark = [
    pytest.mark.skipif(not backend.installed(), reason="triton is not installed"),
    pytest.mark.skipif(not INTERPRETING and not torch.cuda.is_available(), reason=HOW),
    *([] if INTERPRETING else [pytest.mark.gpu]),
]
STEPS, EVERY = 3, 2
GPU = "triton,torch"


class Net(nn.Module):
    """Convolutions with norm, ReLU, residual, pooling; a classifier with dropout between."""

    def __init__(self, width: int, drop: float) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width))
        self.second = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(width, 2 * width),
            nn.ReLU(),
            nn.Dropout(drop),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x) + x)
        return self.head(self.pool(self.second(x)))


def trained(backends: str, device: str, block: tuple[int, int], signal: str) -> dict[str, Any]:
    """Losses, patterns and tensors after STEPS steps with a mask update every EVERY."""
    torch.manual_seed(0)
    width = 32 if block[0] > 4 else 8
    # A mask is a function of seed and place in memory; blocks have another layout on a GPU, and
    # there nn.Dropout is torch's own.
    model = Net(width, 0.3 if INTERPRETING and block[0] <= 4 else 0.0)
    sparsify(model, density=0.4, block=block)
    model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    masks = SparseMomentum(model, optimizer, total_steps=STEPS, update_every=EVERY, signal=signal)
    draw = torch.Generator().manual_seed(1)
    losses = []
    with plan.use_backend(backends):
        for _ in range(STEPS):
            x = torch.randn(3, width, 4, 4, generator=draw).to(device)
            target = torch.randint(width, (3,), generator=draw).to(device)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            masks.step()
            losses.append(float(loss.detach()))
    assert masks.updates >= 1
    found: dict[str, Any] = {"losses": torch.tensor(losses)}
    found |= {f"buffer {name}": b.cpu() for name, b in model.named_buffers()}
    found |= {f"parameter {name}": p.detach().cpu() for name, p in model.named_parameters()}
    for name, layer in sparse_layers(model):
        found[f"pattern {name}"] = layer.pattern.to("cpu").mask()
    return found


@pytest.mark.parametrize(
    ("block", "signal"),
    [((1, 1), "window"), ((4, 1), "window"), ((16, 16), "window"), ((16, 16), "exact")],
    ids=str,
)
def test_a_net_trains_as_on_the_cpu(
    block: tuple[int, int], signal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, statistics, values and grown patterns; every operator served without the CPU's."""
    calls: dict[str, int] = {}
    for op in ("linear_wgrad_dense", "conv2d_wgrad_dense"):
        inner = getattr(torch_ops, op)

        def spy(*args: Any, inner: Any = inner, op: str = op) -> torch.Tensor:
            calls[op] = calls.get(op, 0) + 1
            return inner(*args)

        monkeypatch.setattr(torch_ops, op, spy)
    expected = trained("cpu", "cpu", block, signal)
    assert calls == {}
    found = trained(GPU, DEVICE, block, signal)
    assert calls["linear_wgrad_dense"] > 0 and calls["conv2d_wgrad_dense"] > 0
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
        else:
            assert torch.equal(found[name], tensor), name
