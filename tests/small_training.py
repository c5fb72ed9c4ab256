"""Small sparse models and a training loop for the tests of sparse_kernels.training."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from sparse_kernels.nn.base import SparseLayer
from sparse_kernels.nn.linear import SparseLinear

DTYPE = torch.float64


def make_model(
    sizes=(12, 16, 10, 4), density=0.3, seed=0, dtype=DTYPE, block=(1, 1)
) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for rows_in, rows_out in itertools.pairwise(sizes):
        layers.append(
            SparseLinear(
                rows_in, rows_out, density=density, block=block, generator=generator, dtype=dtype
            )
        )
        layers.append(nn.Tanh())
    return nn.Sequential(*layers[:-1])


def batches(count: int, features=12, classes=4, dtype=DTYPE):
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        x = torch.randn(20, features, generator=generator, dtype=dtype)
        # Unequal input scales keep the momenta of the layers from being alike.
        yield (
            x * torch.linspace(0.2, 2, features, dtype=dtype),
            torch.randint(classes, (20,), generator=generator),
        )


def train(model, optimizer, masks, count, skip=0) -> float:
    loss = torch.zeros(())
    for i, (x, y) in enumerate(batches(count)):
        if i < skip:
            continue
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        masks.step()
    return float(loss.detach())


def sparse(model) -> list[SparseLayer]:
    return [m for m in model.modules() if isinstance(m, SparseLayer)]


def stored(model) -> int:
    return sum(m.pattern.nnzb for m in sparse(model))
