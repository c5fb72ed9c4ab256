"""A whole training gives the same bits on any number of threads.

A dense-masked layer computes in torch, whose libraries round otherwise on another number of
threads, so here all layers stay compressed.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparse_kernels.nn import sparsify
from sparse_kernels.training import SparseMomentum

STEPS, EVERY = 11, 3


def net(block: tuple[int, int]) -> nn.Module:
    """Convolutions, batch norm, pooling, dropout, linear layers: large enough to be shared out."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.1),
        nn.Linear(64 * 8 * 8, 96), nn.ReLU(), nn.Linear(96, 12),
    )  # fmt: skip
    sparsify(model, density=0.1, block=block, generator=torch.Generator().manual_seed(0))
    return model


def trained(threads: int, signal: str, block: tuple[int, int]) -> list[Tensor]:
    """Every tensor of the model and of its optimizer after several mask updates."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = net(block)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        masks = SparseMomentum(
            model, optimizer, total_steps=STEPS, update_every=EVERY, signal=signal,
            window_tolerance=0.7, dense_above=1.0,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(1)
        for _ in range(STEPS):
            x = torch.randn(48, 3, 16, 16, generator=generator)
            y = torch.randint(12, (48,), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            masks.step()
        assert masks.updates == (STEPS - 1) // EVERY
        state = [s["momentum_buffer"] for s in optimizer.state.values()]
        return [t.detach().clone() for t in (*model.state_dict().values(), *state)]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("signal", ["window", "exact"])
@pytest.mark.parametrize("block", [(1, 1), (4, 1)])
def test_training_does_not_depend_on_the_number_of_threads(
    signal: str, block: tuple[int, int]
) -> None:
    one = trained(1, signal, block)
    for threads in (2, 3):
        other = trained(threads, signal, block)
        differing = [
            i for i, (a, b) in enumerate(zip(one, other, strict=True)) if not torch.equal(a, b)
        ]
        assert differing == [], threads
