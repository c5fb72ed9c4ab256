"""Several processes under DistributedDataParallel train as one: weights, masks, bytes, capacity."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_support import run_ranks
from small_training import DTYPE, make_model, sparse
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_kernels import SparseMomentum
from sparse_kernels.nn.linear import SparseLinear
from sparse_kernels.plan import use_backend
from sparse_kernels.training.data_parallel import attachment

STEPS, EVERY, BATCH = 17, 4, 24
HERE = "test_distributed"

SETTINGS: dict[str, dict[str, Any]] = {
    "window": {"signal": "window", "window_tolerance": 0.4},
    "exact, clipped": {"clip": 0.05},
    "gradient": {"growth": "gradient"},
    "random": {"growth": "random"},
    "random, static graph": {"growth": "random", "static_graph": True},
    "gradient, static graph": {"signal": "gradient", "static_graph": True},
    "sampled": {"signal": "sampled", "sample_share": 0.3},
    "sampled, model given": {"signal": "sampled", "sample_share": 0.3, "given": "model"},
    "adam, micro-batches": {"optimizer": "adam", "signal": "window", "micro": 2},
    "blocks, model given": {"block": (2, 1), "signal": "exact", "given": "model"},
    "adamw, no_sync, schedule, overflow": {
        "optimizer": "adamw", "signal": "window", "micro": 3, "no_sync": True, "overflow": 6,
    },
}  # fmt: skip


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
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
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
    no_sync: bool = False,
    overflow: int | None = None,
    static_graph: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Train on this rank's share of each batch; ranks start from other weights and masks.

    no_sync: gradients travel with the last micro-batch only. overflow: the step at which the last
    rank's loss is infinite, under a GradScaler and a OneCycleLR.
    """
    model = make_model((12, 32, 24, 4), density=0.2, seed=rank, block=block)
    ddp = DistributedDataParallel(model, static_graph=static_graph) if world > 1 else model
    made = make_optimizer(optimizer, model)
    masks = SparseMomentum(
        ddp if given == "ddp" else model,
        made,
        total_steps=STEPS,
        update_every=EVERY,
        generator=torch.Generator().manual_seed(rank),
        **{"signal": "exact", **settings},
    )
    losses = []
    scaler = torch.amp.GradScaler("cpu", enabled=overflow is not None, init_scale=2.0**8)
    schedule = OneCycleLR(made, 0.02, 2 * STEPS) if overflow is not None else None
    for step, (x, y) in enumerate(batches()):
        made.zero_grad()
        parts = zip(x[rank::world].chunk(micro), y[rank::world].chunk(micro), strict=True)
        for part, (inputs, labels) in enumerate(parts):
            quiet = no_sync and world > 1 and part + 1 < micro
            with ddp.no_sync() if quiet else contextlib.nullcontext():
                loss = nn.functional.cross_entropy(ddp(inputs), labels) / micro
                bad = step == overflow and rank == world - 1
                scaler.scale(loss * float("inf") if bad else loss).backward()
            losses.append(float(loss.detach()))
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        scaler.step(made)
        scaler.update()
        masks.step()
        if schedule is not None:
            schedule.step()
    assert masks.steps == STEPS - (overflow is not None)
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
    assert all(ranks[0][name]["rebuilt"] for name in alone)


# ---- bytes -------------------------------------------------------------------------------------


class CountBytes(TorchDispatchMode):
    """Bytes of the tensors that collectives are given, by the collective's name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = itertools.chain(*(a for a in args if isinstance(a, (list, tuple))))
            size = sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
            name = func._schema.name
            self.found[name] = self.found.get(name, 0) + size
        return func(*args, **(kwargs or {}))


def bytes_of_steps(rank: int, world: int, folder: Path) -> list[dict[str, int]]:
    """Bytes of each of ten steps, with mask updates after steps 4 and 8, and of a dense net's."""
    torch.manual_seed(rank)
    model = nn.Sequential(
        SparseLinear(200, 300, density=0.05),
        nn.BatchNorm1d(300),
        SparseLinear(300, 100, density=0.05),
    )
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks = SparseMomentum(
        ddp, optimizer, total_steps=10, update_every=4, signal="window", window_tolerance=0.85,
        redistribution="none",
    )  # fmt: skip
    steps = []
    for _ in range(10):
        with CountBytes() as counted:
            optimizer.zero_grad()
            ddp(torch.randn(8, 200)).square().mean().backward()
            optimizer.step()
            masks.step()
        steps.append(counted.found)
    assert attachment(ddp).rebuilt == 0
    dense = nn.Sequential(nn.Linear(200, 300), nn.BatchNorm1d(300), nn.Linear(300, 100))
    wrapped = DistributedDataParallel(dense)
    for _ in range(2):
        with CountBytes() as counted:
            wrapped(torch.randn(8, 200)).square().mean().backward()
    return [*steps, counted.found]


def test_bytes_of_a_step(tmp_path: Path) -> None:
    steps = run_ranks(2, tmp_path, HERE, "bytes_of_steps")[0]
    dense = 4 * (200 * 300 + 300 * 100)
    others = 4 * (300 + 100 + 2 * 300)  # biases and batch norm
    plain, in_window, update = steps[5], steps[6], steps[7]
    print(plain, in_window, update)
    assert steps[-1]["c10d::allreduce_"] == dense + others
    # The gradients: 5 % of the weights, and what is not sparse.
    assert plain["c10d::allreduce_"] == 0.05 * dense + others
    # Before a forward pass only batch norm's buffers travel (two vectors and a counter).
    assert plain["c10d::broadcast_"] == 4 * 2 * 300 + 8
    # Inside of the window 256 numbers per layer besides, and at an update the signal, once.
    assert in_window["c10d::allreduce_"] == plain["c10d::allreduce_"] + 2 * 256 * 8
    assert update["c10d::allreduce_"] == plain["c10d::allreduce_"] + 2 * 256 * 8 + dense
