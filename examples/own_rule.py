"""A rule of your own: redistribution that knows what a weight costs.

Sparse momentum moves weights to layers with a large mean momentum, whatever they cost. This rule
divides the importance of a layer by a cost that you give, so that free places go where a weight is
cheap. A rule is a plain callable: tensors in, tensors out.

python examples/own_rule.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_kernels import SparseMomentum, sparsify
from sparse_kernels.training.rules import LayerState, importance_momentum


def per_cost(cost: dict[str, float]) -> Callable[[Sequence[LayerState]], Tensor]:
    """Redistribution rule: mean momentum of each layer divided by `cost[name]` of one weight."""

    def rule(layers: Sequence[LayerState]) -> Tensor:
        costs = torch.tensor([cost[layer.name] for layer in layers], dtype=torch.float64)
        return importance_momentum(layers).to(torch.float64) / costs

    return rule


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(72, 3)
    )
    sparsify(model, density=0.2, generator=torch.Generator().manual_seed(0))
    # A weight of the convolution is used once per pixel, one of the linear layer once.
    rule = per_cost({"0": 12.0 * 12.0, "4": 1.0})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sparse = SparseMomentum(model, optimizer, total_steps=60, update_every=20, redistribution=rule)
    for step in range(60):
        x = torch.randn(32, 1, 12, 12)
        loss = F.cross_entropy(model(x), x.mean((1, 2, 3)).sign().long() + 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sparse.step()
        if step % 20 == 19:
            print(f"step {step + 1}: weights in conv {model[0].nnz}, in linear {model[4].nnz}")


if __name__ == "__main__":
    main()
