"""Several processes under DistributedDataParallel train as one: weights, masks, bytes, capacity."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_support import run_ranks
from small_training import DTYPE, make_model, sparse
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_kernels import SparseMomentum
from sparse_kernels.nn.linear import SparseLinear
from sparse_kernels.plan import use_backend
from sparse_kernels.training import attach, reserve
from sparse_kernels.training.data_parallel import attachment

STEPS, EVERY, BATCH = 17, 4, 24
HERE = "test_distributed"

SETTINGS: dict[str, dict[str, Any]] = {
    "window": {"signal": "window", "window_tolerance": 0.4},
    "exact, clipped": {"clip": 0.05},
    "gradient": {"growth": "gradient"},
    "random": {"growth": "random"},
    "adam, micro-batches": {"optimizer": "adam", "signal": "window", "micro": 2},
    "blocks, model given": {"block": (2, 1), "signal": "exact", "given": "model"},
}


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    scale = torch.linspace(0.2, 2, 12, dtype=DTYPE)
    return [
        (
            torch.randn(BATCH, 12, generator=generator, dtype=DTYPE) * scale,
            torch.randint(4, (BATCH,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr=0.01)
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3)


def train(
    rank: int,
    world: int,
    *,
    optimizer: str = "sgd",
    clip: float | None = None,
    micro: int = 1,
    block: tuple[int, int] = (1, 1),
    given: str = "ddp",
    **settings: Any,
) -> dict[str, Any]:
    """Train on this rank's share of each batch; ranks start from other weights and masks."""
    model = make_model((12, 32, 24, 4), density=0.2, seed=rank, block=block)
    ddp = DistributedDataParallel(model) if world > 1 else model
    made = make_optimizer(optimizer, model)
    masks = SparseMomentum(
        ddp if given == "ddp" else model,
        made,
        total_steps=STEPS,
        update_every=EVERY,
        generator=torch.Generator().manual_seed(rank),
        **settings,
    )
    losses = []
    for x, y in batches():
        made.zero_grad()
        parts = zip(x[rank::world].chunk(micro), y[rank::world].chunk(micro), strict=True)
        for inputs, labels in parts:
            loss = nn.functional.cross_entropy(ddp(inputs), labels) / micro
            loss.backward()
            losses.append(float(loss.detach()))
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        made.step()
        masks.step()
    return {
        "keys": [layer.pattern.keys().clone() for layer in sparse(model)],
        "dense": [layer.dense_matrix().detach() for layer in sparse(model)],
        "bias": [layer.bias.detach() for layer in sparse(model)],
        "storage": [layer.storage for layer in sparse(model)],
        "reallocated": [r.reallocated for r in masks.history],
        "rebuilt": attachment(ddp).rebuilt if world > 1 else 0,
        "losses": losses,
    }


def all_settings(rank: int, world: int, folder: Path) -> dict[str, Any]:
    with use_backend("reference"):
        return {name: train(rank, world, **chosen) for name, chosen in SETTINGS.items()}


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return all_settings(0, 1, Path())


@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_train_as_one(world: int, alone: Any, tmp_path: Path) -> None:
    ranks = run_ranks(world, tmp_path, HERE, "all_settings")
    reallocated = 0
    for name, one in alone.items():
        for found in (rank[name] for rank in ranks):
            assert len(found["reallocated"]) == (STEPS - 1) // EVERY
            assert found["storage"] == one["storage"]
            for a, b in zip(found["keys"], one["keys"], strict=True):
                assert torch.equal(a, b), name
            for part in ("dense", "bias"):
                for a, b in zip(found[part], one[part], strict=True):
                    torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=name)
        first = ranks[0][name]["dense"]
        for other in ranks[1:]:
            assert all(map(torch.equal, first, other[name]["dense"])), name
        reallocated += sum(map(bool, one["reallocated"]))
        assert sum(rank[name]["rebuilt"] for rank in ranks) % world == 0
    # Otherwise the reducer was never stale, and equality shows nothing about it.
    assert reallocated > 0
    assert any(ranks[0][name]["rebuilt"] for name in alone)
