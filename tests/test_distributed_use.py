"""Jobs of two ranks: checkpoints, what is refused, masks that could drift, layers not reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_support import run_ranks
from small_training import make_model, sparse
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from sparse_kernels import SparseMomentum
from sparse_kernels.nn.linear import SparseLinear
from sparse_kernels.plan import use_backend
from sparse_kernels.training import (
    Candidates,
    CheckpointError,
    attach,
    flops_per_weight,
    load_checkpoint,
    save_checkpoint,
    time_per_weight,
)
from sparse_kernels.training.checkpoint_files import checkpoint_folders
from sparse_kernels.training.data_parallel import attachment
from sparse_kernels.training.process_group import Group
from sparse_kernels.workbench.config import TrainConfig
from sparse_kernels.workbench.contenders import build_sparse
from sparse_kernels.workbench.errors import TrainingError
from sparse_kernels.workbench.ranks import Ranks

HERE = "test_distributed_use"


class Job:
    """A model with dropout under DDP, its optimizer and masks; every rank draws its own data."""

    def __init__(self, rank: int, **settings: Any) -> None:
        torch.manual_seed(rank)
        model = make_model((12, 32, 24, 4), density=0.2, seed=rank)
        self.ddp = DistributedDataParallel(nn.Sequential(nn.Dropout(0.2), model))
        self.optimizer = torch.optim.SGD(self.ddp.parameters(), lr=0.2, momentum=0.9)
        chosen = {"total_steps": 20, "update_every": 4, "signal": "exact", **settings}
        self.masks = SparseMomentum(self.ddp, self.optimizer, **chosen)

    def train(self, count: int) -> None:
        for _ in range(count):
            self.optimizer.zero_grad()
            x = torch.randn(8, 12, dtype=torch.float64)
            self.ddp(x).square().sum().backward()
            self.optimizer.step()
            self.masks.step()

    def weights(self) -> list[Tensor]:
        layers = sparse(self.ddp)
        return [t.detach().clone() for s in layers for t in (s.dense_matrix(), s.bias)]


def error_of(action: Any) -> str:
    try:
        action()
    except (RuntimeError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


# ---- checkpoints -------------------------------------------------------------------------------


def saved_and_resumed(rank: int, world: int, folder: Path) -> dict[str, Any]:
    whole = Job(rank)
    whole.train(10)
    unsaved = error_of(whole.masks.state_dict)
    path = save_checkpoint(folder / "c", 10, whole.ddp, whole.optimizer, whole.masks)
    whole.train(10)
    late = Job(rank + 7)  # wrapped before it is loaded: DDP's reducer knows other shapes
    late.train(1)
    found = load_checkpoint(folder / "c", late.ddp, late.optimizer, late.masks)
    late.train(10)
    bare = Job(rank + 5)  # the model inside of DDP is known to the masks, too
    load_checkpoint(path, bare.ddp.module, bare.optimizer, bare.masks)
    bare.train(10)
    failed = error_of(
        lambda: save_checkpoint(folder / "c", -1, whole.ddp, whole.optimizer, whole.masks)
    )
    return {
        "unsaved": unsaved,
        "step": found.step,
        "folders": len(list((folder / "c").iterdir())),
        "rebuilt": attachment(late.ddp).rebuilt,
        "failed": failed,
        "runs": [job.weights() for job in (whole, late, bare)],
    }


def test_checkpoint_of_two_ranks(tmp_path: Path) -> None:
    ranks = run_ranks(2, tmp_path, HERE, "saved_and_resumed")
    first = ranks[0]["runs"][0]
    for found in ranks:
        assert "synchronize()" in found["unsaved"]
        assert found["step"] == 10
        assert found["rebuilt"] > 0
        for run in found["runs"]:
            assert all(map(torch.equal, run, first))
    assert "ValueError" in ranks[0]["failed"]
    assert "rank 0 of this job failed" in ranks[1]["failed"]
    model = make_model((12, 32, 24, 4), density=0.2)
    alone = nn.Sequential(nn.Dropout(0.2), model)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.2, momentum=0.9)
    load_checkpoint(tmp_path / "c", alone, optimizer)  # one process may go on alone
    with pytest.raises(CheckpointError, match="holds those of 2"):
        from sparse_kernels.training import generators

        generators.of_rank({}, [{}], 0, 4)


class Given(Job):
    """SparseMomentum is given the model itself and so learns of DDP in the first forward pass."""

    def __init__(self, rank: int, **settings: Any) -> None:
        super().__init__(rank, **settings)
        self.masks.close()
        chosen = {"total_steps": 20, "update_every": 4, "signal": "exact", **settings}
        self.masks = SparseMomentum(self.ddp.module, self.optimizer, **chosen)


def resumed_before_ddp_is_known(rank: int, world: int, folder: Path) -> dict[str, Any]:
    whole = Job(rank)
    whole.train(2)
    save_checkpoint(folder / "c", 2, whole.ddp, whole.optimizer, whole.masks)
    expected = torch.rand(3)
    late = Given(rank + 3)
    load_checkpoint(folder / "c", late.ddp.module, late.optimizer, late.masks)
    drawn = torch.rand(3)
    torch.manual_seed(rank)
    early = Given(rank)
    torch.manual_seed(rank)
    save_checkpoint(folder / "e", 0, early.ddp.module, early.optimizer, early.masks)
    first = torch.rand(3)
    load_checkpoint(folder / "e", early.ddp.module, early.optimizer, early.masks)
    return {"right": (expected, first), "drawn": (drawn, torch.rand(3))}


def test_each_rank_has_its_own_generators_before_the_first_forward(tmp_path: Path) -> None:
    ranks = run_ranks(2, tmp_path, HERE, "resumed_before_ddp_is_known")
    for found in ranks:
        assert all(map(torch.equal, found["drawn"], found["right"]))
    assert not any(map(torch.equal, ranks[0]["drawn"], ranks[1]["drawn"]))
    assert len(checkpoint_folders(tmp_path / "e")) == 1  # rank 0 alone writes


def resumed_in_a_window(rank: int, world: int, folder: Path) -> dict[str, Any]:
    settings = {"signal": "sampled", "sample_share": 0.3, "window_tolerance": 0.4}
    whole = Job(rank, **settings)
    whole.train(6)  # the window of update 8 holds nine steps
    save_checkpoint(folder / "c", 6, whole.ddp, whole.optimizer, whole.masks)
    whole.train(6)
    late = Given(rank + 3, **settings)
    load_checkpoint(folder / "c", late.ddp.module, late.optimizer, late.masks)
    gathered = [signal.gathered for signal in late.masks._signals]
    late.train(6)
    other = Given(rank, **settings)
    other.masks.close()
    drawing = {"generator": torch.Generator().manual_seed(rank), "total_steps": 20}
    other.masks = SparseMomentum(
        other.ddp.module, other.optimizer, update_every=4, **drawing, **settings
    )
    for signal in other.masks._signals:
        signal.gathered = rank
    refused = error_of(lambda: other.train(1))
    return {"runs": [whole.weights(), late.weights()], "gathered": gathered, "refused": refused}


def test_a_sample_gathered_before_the_first_forward_is_kept(tmp_path: Path) -> None:
    for found in run_ranks(2, tmp_path, HERE, "resumed_in_a_window"):
        assert all(n > 0 for n in found["gathered"])
        assert all(map(torch.equal, *found["runs"]))
        assert "layer '1.0': rank 0 has drawn another sample" in found["refused"]


def loaded_where_one_rank_cannot(rank: int, world: int, folder: Path) -> list[str]:
    job = Job(0)
    parts = (job.ddp, job.optimizer, job.masks)
    save_checkpoint(folder / "c", 0, *parts)
    missing = folder / ("c" if rank == 0 else "nothing")
    other = torch.optim.Adam(job.ddp.parameters()) if rank == 1 else job.optimizer
    return [
        error_of(lambda: load_checkpoint(missing, *parts)),
        error_of(lambda: load_checkpoint(folder / "c", job.ddp, other, job.masks)),
    ]


def test_a_rank_without_a_good_checkpoint_is_named_on_all(tmp_path: Path) -> None:
    for errors in run_ranks(2, tmp_path, HERE, "loaded_where_one_rank_cannot"):
        print(errors)
        for error in errors:
            assert error.startswith("CheckpointError: ") and "rank 1 of this job: " in error
        assert "nothing" in errors[0] and "param group" in errors[1]


# ---- costs ----------------------------------------------------------------------------------


def costs_of_wrapped(rank: int, world: int, folder: Path) -> list[list[str]]:
    ddp = DistributedDataParallel(make_model())
    example = torch.randn(4, 12, dtype=torch.float64)
    counted, timed = flops_per_weight(ddp, example), time_per_weight(ddp, example, repeats=2)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    SparseMomentum(
        ddp,
        optimizer,
        total_steps=4,
        update_every=2,
        cost=counted,
        cost_budget="start",
        signal="exact",
    ).close()
    assert counted == flops_per_weight(ddp.module, example)
    return [list(counted), list(timed)]


def test_costs_of_a_wrapped_model_name_its_layers(tmp_path: Path) -> None:
    (found,) = run_ranks(1, tmp_path, HERE, "costs_of_wrapped")
    assert found == [["0", "2", "4"]] * 2


# ---- refusals ----------------------------------------------------------------------------------


def refused(rank: int, world: int, folder: Path) -> dict[str, str]:
    found = {"not wrapped": error_of(lambda: attach(make_model()))}
    ddp = DistributedDataParallel(make_model())
    if rank == 1:
        layer = sparse(ddp)[1]
        keys = layer.pattern.keys()
        free = next(i for i in range(160) if i not in keys.tolist())
        layer.set_pattern_(torch.cat([keys[1:], torch.tensor([free])]).sort().values)
    found["other masks"] = error_of(lambda: attach(ddp))

    own = distributed.new_group([0, 1])
    grouped = attach(DistributedDataParallel(make_model(), process_group=own))
    sparse(grouped)[0].to_storage_("dense-masked")
    x = torch.randn(4, 12, dtype=torch.float64)
    found["own group"] = error_of(lambda: grouped(x))

    changed = DistributedDataParallel(make_model(), process_group=own)
    sparse(changed)[1].to_storage_("dense-masked")
    found["own group, changed before"] = error_of(lambda: attach(changed))

    static = attach(DistributedDataParallel(make_model(), static_graph=True))
    static(x).sum().backward()
    sparse(static)[0].to_storage_("dense-masked")
    with static.no_sync():
        found["static graph"] = error_of(lambda: static(x))

    part = nn.ModuleList([DistributedDataParallel(make_model()), make_model()])
    optimizer = torch.optim.SGD(part.parameters(), lr=0.1, momentum=0.9)
    masks = SparseMomentum(part, optimizer, total_steps=8, update_every=4, signal="exact")
    found["outside"] = error_of(lambda: part[0](x))
    masks.close()

    sharded = fully_shard(make_model(dtype=torch.float32))
    made = torch.optim.SGD(sharded.parameters(), lr=0.1, momentum=0.9)
    found["fully_shard"] = error_of(
        lambda: SparseMomentum(sharded, made, total_steps=8, update_every=4, signal="exact")
    )
    return found


def test_refusals_say_why(tmp_path: Path) -> None:
    for found in run_ranks(2, tmp_path, HERE, "refused"):
        print(found)
        assert "DistributedDataParallel(model)" in found["not wrapped"]
        assert "layer '2'" in found["other masks"] and "rank 1" in found["other masks"]
        assert "process group of its own" in found["own group"]
        assert "cannot be built anew in place" in found["own group, changed before"]
        assert "static_graph inside of no_sync()" in found["static graph"]
        assert "'1.0'" in found["outside"]
        assert "FullyShardedDataParallel" in found["fully_shard"]
        assert "range of the slots" in found["fully_shard"]


def test_the_class_of_fsdp_is_refused_too() -> None:
    """torch makes one only where there is an accelerator, so this one is put together by hand."""
    model = make_model()
    wrapped = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped._modules["_fsdp_wrapped_module"] = model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="FullyShardedDataParallel, which the mask updates"):
        SparseMomentum(wrapped, optimizer, total_steps=8, update_every=4, signal="exact")


# ---- numbers that are none ---------------------------------------------------------------------


def overflowing(rank: int, world: int, folder: Path) -> str:
    """A step of `sparse-kernels train` in which the share of rank 1 alone overflows."""
    made = build_sparse(TrainConfig(threads=1), 0, 8, 4, Ranks(Group(distributed.group.WORLD)))
    images, labels = torch.rand(6, 1, 28, 28), torch.arange(6)
    made.step(images, labels)
    images[1::2] = 3e38
    with torch.no_grad():
        sparse(made.model)[0].values.mul_(100)
    with pytest.raises(TrainingError) as caught:
        made.step(images, labels)
    return str(caught.value)


def test_the_layer_and_the_rank_of_a_bad_loss_are_named(tmp_path: Path) -> None:
    for message in run_ranks(2, tmp_path, HERE, "overflowing"):
        print(message)
        assert "the loss of step 2" in message  # on rank 0, which prints, as on rank 1
        assert "rank 1: layer '1' is the first whose output is not finite" in message


# ---- drift -------------------------------------------------------------------------------------


def drawn_by_rank(candidates: Candidates, count: int) -> Tensor:
    """A growth rule that draws from the global generator, which every rank has seeded itself."""
    free = torch.ones(candidates.blocks, dtype=torch.bool)
    free[candidates.kept] = False
    places = free.nonzero().reshape(-1)
    return places[torch.randperm(places.numel())[:count]]


class Branches(nn.Module):
    """A layer that every rank uses, one that only rank 0 uses."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        make = {"density": 0.2, "dtype": torch.float64}
        self.first, self.rare = SparseLinear(12, 16, **make), SparseLinear(12, 16, **make)

    def forward(self, x: Tensor) -> Tensor:
        both = self.first(x) + self.rare(x) if self.rank == 0 else self.first(x)
        return both.square().sum()


def drifting(rank: int, world: int, folder: Path) -> dict[str, Any]:
    job = Job(rank, growth=drawn_by_rank)
    job.train(9)
    torch.manual_seed(3)
    ddp = DistributedDataParallel(Branches(rank), find_unused_parameters=True)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    masks = SparseMomentum(ddp, optimizer, total_steps=8, update_every=4, signal="exact")
    x = torch.randn(7, 12, dtype=torch.float64)
    sums = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = ddp(x)
        loss.backward()
        optimizer.step()
        masks.step()
        sums.append(float(loss.detach()))
    equal = [t.detach() for s in sparse(ddp) for t in (s.values, s.pattern.keys())]
    return {"weights": job.weights(), "rare": equal, "updates": masks.updates}


def test_masks_stay_equal_where_ranks_draw_or_skip_a_layer(tmp_path: Path) -> None:
    with use_backend("reference"):
        one, two = run_ranks(2, tmp_path, HERE, "drifting")
    assert all(map(torch.equal, one["weights"], two["weights"]))
    assert all(map(torch.equal, one["rare"], two["rare"]))
    assert one["updates"] == 1
