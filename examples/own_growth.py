"""A growth rule of your own in ten lines: half of the new weights by signal, half at random.

A growth rule gets the free places of one layer and how many it grows there; it returns their keys.

python examples/own_growth.py
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_kernels import SparseMomentum, sparsify
from sparse_kernels.training.rules import Candidates, grow_largest, grow_random


def grow_half_at_random(places: Candidates, count: int) -> Tensor:
    """The count // 2 places of largest signal, and others drawn at random."""
    best = grow_largest(places, count // 2)
    taken = torch.cat([places.kept, best]).sort().values
    rest = dataclasses.replace(places, kept=taken, scores=None)
    return torch.cat([best, grow_random(rest, count - count // 2)])


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3))
    sparsify(model, density=0.2, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparse = SparseMomentum(
        model, optimizer, total_steps=60, update_every=20, growth=grow_half_at_random
    )
    for step in range(60):
        x = torch.randn(32, 20)
        loss = F.cross_entropy(model(x), x[:, :3].argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        record = sparse.step()
        if record is not None:
            print(f"step {step + 1}: {record.removed} moved, {sum(record.nnz_after.values())} kept")


if __name__ == "__main__":
    main()
