"""Costs of weights decide masks: equal on all ranks, kept in checkpoints, checked there."""

from __future__ import annotations

import logging
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_support import run_ranks
from small_training import make_model, sparse, train
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparse_kernels import SparseMomentum
from sparse_kernels.training import (
    CheckpointError,
    checkpoint_files,
    costs,
    load_checkpoint,
    save_checkpoint,
    time_per_weight,
)

pytestmark = pytest.mark.usefixtures("one_thread")

HERE = "test_cost_state"
STEPS, EVERY = 20, 3
#: What machines measure, by layer: on the second, the dear layer is the cheap one.
MACHINES = ({"0": 0.25, "2": 3.0, "4": 50.0}, {"0": 40.0, "2": 2.0, "4": 0.5})
NAMES = tuple(MACHINES[0])


def measured(machine: int, model: nn.Module) -> Any:
    """time_per_weight where the clock of `machine` is read."""
    seconds = dict(zip(sparse(model), MACHINES[machine].values(), strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(costs, "_least", lambda layer, x, repeats: seconds[layer] * layer.nnz)
        found = time_per_weight(model, torch.zeros(2, 12, dtype=torch.float64))
    assert list(found.values()) == pytest.approx(list(MACHINES[machine].values()))
    return found


def spent(model: nn.Module, cost: dict[str, float]) -> Fraction:
    named = zip(NAMES, sparse(model), strict=True)
    return sum((Fraction(cost[name]) * s.pattern.nnzb for name, s in named), Fraction(0))


class Job:
    """A training with a budget; `held`: what the pattern costs at first and after each step."""

    def __init__(self, model: nn.Module, given: nn.Module, cost: Any, **options: Any) -> None:
        self.model, self.given = model, given
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        defaults = {"cost_weight": 0.5, "cost_budget": "start", "cost": cost, "signal": "exact"}
        options = defaults | options
        self.masks = SparseMomentum(
            given, self.optimizer, total_steps=STEPS, update_every=EVERY, dense_above=1.0, **options
        )
        self.held: list[Fraction] = []

    @property
    def parts(self) -> tuple[nn.Module, torch.optim.Optimizer, SparseMomentum]:
        return self.given, self.optimizer, self.masks

    def train(self, until: int, called: nn.Module | None = None) -> None:
        """called: what is called for the loss; the model that SparseMomentum was given if None."""
        for step in range(self.masks.steps, until):
            self.held.append(spent(self.model, MACHINES[0]))
            train(called or self.given, self.optimizer, self.masks, step + 1, skip=step)
        self.held.append(spent(self.model, MACHINES[0]))

    def weights(self) -> list[torch.Tensor]:
        return [t.detach().clone() for t in self.model.state_dict().values()]


def alone(machine: int | None, *, density: float = 0.3, **options: Any) -> Job:
    model = make_model(density=density)
    return Job(model, model, None if machine is None else measured(machine, model), **options)


# ---- ranks -------------------------------------------------------------------------------------


class Heard(logging.Handler):
    """The messages of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        logging.getLogger("sparse_kernels").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def on_two_machines(rank: int, world: int, folder: Path) -> dict[str, Any]:
    ways = ("ddp", "model", "measured on rank 0 alone")
    return {given: one_job(rank, given, folder / given) for given in ways}


def one_job(rank: int, given: str, folder: Path) -> dict[str, Any]:
    """A training, and its second half again from a checkpoint, with the machines exchanged."""
    heard, runs = Heard(), []
    for machine in (rank, 1 - rank):
        model = make_model(seed=rank)
        ddp = DistributedDataParallel(model)
        cost = measured(machine, model)
        mine = None if given == "measured on rank 0 alone" and rank else cost
        job = Job(model, model if given == "model" else ddp, mine)
        if runs:
            load_checkpoint(folder, *job.parts)
        else:
            job.train(10, ddp)
            save_checkpoint(folder, 10, *job.parts)
        job.train(STEPS, ddp)
        runs.append({"costs": job.masks._limits.costs, "held": job.held, "weights": job.weights()})
    return {"runs": runs, "heard": heard.texts}


def test_ranks_that_measure_otherwise_take_rank_0s_costs(tmp_path: Path) -> None:
    ranks = run_ranks(2, tmp_path, HERE, "on_two_machines")
    for given, first in ranks[0].items():
        for rank in ranks:
            found = rank[given]
            assert not [text for text in found["heard"] if "planned another mask" in text]
            for run in found["runs"]:
                assert run["costs"] == first["runs"][0]["costs"], given
                assert list(run["costs"].values()) == pytest.approx(list(MACHINES[0].values()))
                assert max(run["held"]) <= first["runs"][0]["held"][0], given
                assert all(map(torch.equal, run["weights"], first["runs"][0]["weights"])), given
        assert len(set(first["runs"][0]["held"])) > 3, "the masks must have moved"


def refused_on_one(rank: int, world: int, folder: Path) -> str:
    ddp = DistributedDataParallel(make_model())
    cost: Any = {"0": 1.0, "2": "dear", "4": 1.0} if rank == 0 else {"0": 1.0}
    try:
        Job(ddp.module, ddp, cost)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


def test_costs_of_rank_0_that_are_none_stop_every_rank(tmp_path: Path) -> None:
    for found in run_ranks(2, tmp_path, HERE, "refused_on_one"):
        assert "could not convert string to float: 'dear'" in found


# ---- checkpoints -------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [2, 3, 10])
def test_a_resumed_training_keeps_the_costs_it_began_with(stop, tmp_path, monkeypatch, caplog):
    whole, other = alone(0), alone(1)
    whole.train(STEPS)
    other.train(STEPS)
    assert not all(map(torch.equal, whole.weights(), other.weights())), "or this shows nothing"
    part = alone(0)
    part.train(stop)
    save_checkpoint(tmp_path, stop, *part.parts)
    late = alone(1, density=0.2)
    with caplog.at_level(logging.WARNING, "sparse_kernels"):
        load_checkpoint(tmp_path, *late.parts)
    assert "costs of weights are the checkpoint's, not those given here: '0' 0.25 for 40" in (
        caplog.text
    )
    late.train(STEPS)
    assert all(map(torch.equal, whole.weights(), late.weights()))
    assert max(late.held) <= whole.held[0]
    caplog.clear()
    load_checkpoint(tmp_path, *alone(0).parts)
    assert caplog.text == ""


def test_a_layer_frozen_for_a_while_moves_no_budget() -> None:
    """What the first pattern cost stays what it cost, whichever layers the first update left."""
    job = alone(0, cost_weight=0.0, growth="random")
    dear = sparse(job.model)[2]
    dear.values.requires_grad_(False)
    job.train(4)
    dear.values.requires_grad_(True)
    job.train(STEPS)
    assert job.masks._limits.start == job.masks.history[0].nnz_before | {"4": 12}
    assert max(job.held) <= job.held[0] and len(set(job.held)) > 3


def change(tree: dict[str, Any], **entries: Any) -> dict[str, Any]:
    return {key: value for key, value in {**tree, **entries}.items() if value is not ABSENT}


ABSENT = object()
GOOD = MACHINES[0]
HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "no dict": ({"costs": 3}, "costs of the checkpoint: expected a number for each"),
    "none": ({"costs": None}, "expected a number for each"),
    "lost": ({"costs": {}}, "since its config has cost_weight=0.5 and cost_budget='start'"),
    "a layer less": ({"costs": {"0": 1.0, "2": 1.0}}, "each of the layers"),
    "another layer": ({"costs": {"0": 1.0, "2": 1.0, "5": 1.0}}, "each of the layers"),
    "text": ({"costs": {**GOOD, "2": "1.0"}}, "layer '2' must be above 0 and finite, got '1.0'"),
    "truth": ({"costs": {**GOOD, "2": True}}, "'2' must be above 0 and finite, got True"),
    "a tensor": ({"costs": {**GOOD, "2": torch.ones(1)}}, "'2' must be above 0 and finite"),
    "nothing": ({"costs": {**GOOD, "2": 0.0}}, "'2' must be above 0 and finite, got 0.0"),
    "negative": ({"costs": {**GOOD, "4": -3.0}}, "'4' must be above 0 and finite, got -3.0"),
    "NaN": ({"costs": {**GOOD, "0": float("nan")}}, "'0' must be above 0 and finite, got nan"),
    "infinite": ({"costs": {**GOOD, "0": float("inf")}}, "'0' must be above 0 and finite, got inf"),
    "too large": ({"costs": {**GOOD, "0": 1e307}}, "more than a float64 holds"),
    "a huge integer": ({"costs": {**GOOD, "0": 10**400}}, "more than a float64 holds"),
    "start: a layer less": ({"start": {"0": 5, "2": 5}}, "stored blocks before the first update"),
    "start: above all": ({"start": {"0": 193, "2": 5, "4": 5}}, "got {'0': 193"),
    "start: negative": ({"start": {"0": -1, "2": 5, "4": 5}}, "numbers of blocks {'0': 192"),
    "start: a fraction": ({"start": {"0": 1.5, "2": 5, "4": 5}}, "a count for each"),
    "start: no dict": ({"start": [57, 48, 12]}, "a count for each"),
    "history for it": ({"start": ABSENT, "history": "nnz_before"}, "a fault|a count for each"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("limited", [True, False])
def test_hostile_costs_are_refused_and_change_nothing(name, limited, tmp_path) -> None:
    entries, message = HOSTILE[name]
    job = alone(0)
    job.train(5)
    folder = save_checkpoint(tmp_path, 5, *job.parts)
    state = checkpoint_files.read(folder).state
    if "history" in entries:
        state["masks"]["history"][0]["nnz_before"] = {"0": 10**9, "2": 5, "4": 5}
    kept = {key: value for key, value in entries.items() if key != "history"}
    state["masks"] = change(state["masks"], **kept)
    path = checkpoint_files.write(tmp_path, 5, state)
    fresh = alone(1) if limited else alone(None, cost_weight=0.0, cost_budget=None)
    before, given = fresh.weights(), dict(fresh.masks._limits.costs)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path, *fresh.parts)
    assert all(map(torch.equal, before, fresh.weights())) and fresh.masks.steps == 0
    assert fresh.masks._limits.costs == given and fresh.masks._limits.start is None


def test_a_checkpoint_from_before_costs_were_stored_goes_on_and_says_so(tmp_path) -> None:
    whole, part = alone(0), alone(0)
    whole.train(STEPS)
    part.train(10)
    save_checkpoint(tmp_path, 10, *part.parts)
    state = checkpoint_files.read(checkpoint_files.checkpoint_folders(tmp_path)[0]).state
    del state["masks"]["costs"], state["masks"]["start"]
    checkpoint_files.write(tmp_path, 10, state)
    late = alone(0, density=0.2)
    with pytest.warns(RuntimeWarning, match="written before costs of weights were stored"):
        load_checkpoint(tmp_path, *late.parts)
    late.train(STEPS)
    assert all(map(torch.equal, whole.weights(), late.weights()))
    assert late.masks._limits.start == whole.masks._limits.start


def test_costs_that_are_new_or_no_longer_wanted_go_by_the_new_settings(tmp_path) -> None:
    free, bound = alone(None, cost_weight=0.0, cost_budget=None), alone(0)
    for job, folder in ((free, tmp_path / "free"), (bound, tmp_path / "bound")):
        job.train(5)
        save_checkpoint(folder, 5, *job.parts)
    later = alone(1)
    with pytest.warns(RuntimeWarning, match="cost_weight 0.0 -> 0.5"):
        load_checkpoint(tmp_path / "free", *later.parts)
    assert list(later.masks._limits.costs.values()) == pytest.approx(list(MACHINES[1].values()))
    loose = alone(None, cost_weight=0.0, cost_budget=None)
    with pytest.warns(RuntimeWarning, match="cost_weight 0.5 -> 0.0"):
        load_checkpoint(tmp_path / "bound", *loose.parts)
    assert loose.masks._limits.costs == {}
    loose.train(STEPS)
