"""What a contender costs and how it steps: account, layouts, peak memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from workbench_support import SMALL, batch

from sparse_kernels.nn import sparsify
from sparse_kernels.workbench import account, contenders, datasets, loop
from sparse_kernels.workbench.bench import networks
from sparse_kernels.workbench.errors import TrainingError, WorkbenchError
from sparse_kernels.workbench.ranks import Ranks


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tests run side by side; threads would only wait for each other
    yield
    torch.set_num_threads(before)


def test_flops_weigh_each_weight_by_its_outputs() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
    sparsify(net, density=0.25, exclude=["3"], generator=torch.Generator().manual_seed(0))
    positions = account.output_positions(net, (3, 9, 9))
    assert positions == {"0": 16, "3": 1}
    costs = {c.name: c for c in account.layer_costs(net, positions)}
    assert (costs["0"].nnz, costs["0"].numel) == (54, 216)
    assert (costs["3"].nnz, costs["3"].numel) == (1280, 1280)
    both = list(costs.values())
    assert account.weight_density(both) == pytest.approx((54 + 1280) / (216 + 1280))
    assert account.flops_density(both) == pytest.approx((54 * 16 + 1280) / (216 * 16 + 1280))


def test_costs_are_timed_on_the_examples_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    for name in ("time_per_weight", "flops_per_weight"):
        costs_of = getattr(contenders, name)

        def noted(model: nn.Module, example: Tensor, costs_of: Any = costs_of) -> dict[str, float]:
            seen.append(len(example))
            return costs_of(model, example)

        monkeypatch.setattr(contenders, name, noted)
    budget = dataclasses.replace(SMALL, batch_size=9, flops_budget="start")
    ranks = Ranks()
    ranks.rank, ranks.world = 1, 2
    for config in (dataclasses.replace(budget, cost="time"), budget):
        contenders.build_sparse(config, 0, 10, 10)
        contenders.build_sparse(config, 0, 10, 10, ranks)
    assert seen == [9, 4, 1, 1]


def test_memory_counts_every_tensor_that_stays() -> None:
    dense = contenders.build_dense(SMALL, 0, "contiguous")
    sparse = contenders.build_sparse(SMALL, 0, 1000, 1000)
    for contender in (dense, sparse):
        contender.step(*batch())
    weights = 784 * 300 + 300 * 100 + 100 * 10
    assert account.memory(dense.model, dense.optimizer) == {
        "weights": 4 * (weights + 410),
        "indices": 0,
        "gradients": 4 * (weights + 410),
        "optimizer": 4 * (weights + 410),
        "total": 12 * (weights + 410),
    }
    held = account.memory(sparse.model, sparse.optimizer)
    nnz = weights // 10
    assert held["weights"] == held["gradients"] == held["optimizer"]
    assert 4 * (nnz + 410) <= held["weights"] <= 1.3 * 4 * (nnz + 410)
    # Column index, row index and permutation of the transposed pattern: 12 bytes each. At most the
    # lists that kernels keep: 8 bytes forward and 8 backward, and a few bands of row starts; linear
    # layers of elements need none forward.
    rows = 4 * (784 + 300 + 300 + 100 + 100 + 10)
    assert 12 * nnz <= held["indices"] < 1.3 * 28 * nnz + 16 * rows


@pytest.mark.parametrize(
    ("signal", "dense_copies"), [("exact", 2), ("window", 2), ("gradient", 1), ("random", 0)]
)
def test_the_growth_signal_is_counted_at_its_highest(signal: str, dense_copies: int) -> None:
    config = dataclasses.replace(SMALL, signal=signal, update_every=None)
    contender = contenders.build_sparse(config, 0, 100, 4)
    for _ in range(5):
        contender.step(*batch())
    weights = 784 * 300 + 300 * 100 + 100 * 10
    # The dense gradients of all layers and, where momentum is gathered, as much momentum.
    assert contender.signal_peak == 4 * weights * dense_copies
    outside = contenders.build_sparse(config, 0, 10_000, 1000)
    outside.step(*batch())
    assert (outside.signal_peak > 0) == (signal == "exact")


def test_a_dense_masked_layer_executes_dense_flops() -> None:
    net = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10))
    sparsify(net, density=0.5, generator=torch.Generator().manual_seed(0))
    positions = account.output_positions(net, (20,))
    before = account.layer_costs(net, positions)
    assert account.executed_flops_density(before) == account.flops_density(before)
    net[0].to_storage_("dense-masked")
    costs = account.layer_costs(net, positions)
    assert account.flops_density(costs) == pytest.approx(0.5)
    assert account.executed_flops_density(costs) == pytest.approx((600 + 150) / (600 + 300))


@pytest.mark.parametrize("error", [FloatingPointError, RuntimeError])
def test_what_sparse_momentum_refuses_is_a_training_error(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    contender = contenders.build_sparse(SMALL, 0, 100, 10)

    def refuse() -> None:
        raise error("layer '1': the momentum is not finite")

    assert contender.masking is not None
    monkeypatch.setattr(contender.masking, "step", refuse)
    with pytest.raises(TrainingError, match="sparse: step 1: layer '1'"):
        contender.step(*batch())


def test_compiled_channels_last_compiles_and_arranges_its_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def compiled(model: nn.Module, **options: object) -> Any:
        def forward(images: torch.Tensor) -> torch.Tensor:
            seen.append(images.is_contiguous(memory_format=torch.channels_last))
            return model(images)

        return forward

    monkeypatch.setattr(torch, "compile", compiled)
    config = dataclasses.replace(SMALL, net="vgg16-d")
    contender = contenders.build_dense(config, 0, "compile_channels_last")
    weight = contender.model.get_parameter("0.3.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    images = torch.randn(2, 3, 32, 32)
    contender.step(images, torch.tensor([0, 1]))
    split = datasets.Split(torch.zeros(5, 3, 32, 32, dtype=torch.uint8), torch.zeros(5).long())
    data = datasets.Dataset("x", "cifar10", split, split, (0.0,) * 3, (1.0,) * 3, "here")
    before = {name: t.clone() for name, t in contender.model.state_dict().items()}
    loop.warm_up(contender, datasets.BatchLoader(split, data, 3, seed=0))
    assert seen == [True, True, True]  # the step, and both batch sizes of an epoch
    for name, tensor in contender.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_contenders_start_alike_and_layouts_compute_the_same() -> None:
    config = dataclasses.replace(SMALL, net="lenet-5-caffe")
    losses = [
        [contender.step(*batch(config)) for _ in range(3)]
        for contender in (
            contenders.build_dense(config, 3, "contiguous"),
            contenders.build_dense(config, 3, "channels_last"),
            contenders.build_sparse(dataclasses.replace(config, density=1.0), 3, 100, 100),
        )
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)  # density 1 keeps every weight


def test_the_learning_rate_falls_every_so_many_steps() -> None:
    contender = contenders.build_dense(
        dataclasses.replace(SMALL, lr_decay_every=2), 0, "contiguous"
    )
    rates = []
    for _ in range(5):
        contender.step(*batch())
        rates.append(contender.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_a_loss_that_is_no_number_stops_before_it_is_learnt(kind: str) -> None:
    contender = (
        contenders.build_sparse(SMALL, 0, 100, 100)
        if kind == "sparse"
        else contenders.build_dense(SMALL, 0, "contiguous")
    )
    images, labels = batch()
    contender.step(images, labels)
    before = [p.detach().clone() for p in contender.model.parameters()]
    images[3] = float("nan")
    with pytest.raises(TrainingError, match=rf"{kind}: the loss of step 2 is nan.*--lr"):
        contender.step(images, labels)
    for old, new in zip(before, contender.model.parameters(), strict=True):
        assert torch.equal(old, new)


def test_the_fastest_dense_layout_is_chosen_and_failures_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    config = dataclasses.replace(SMALL, net="lenet-5-caffe", dense_baseline="auto")
    assert contenders.dense_layouts(config) == [
        "contiguous",
        "channels_last",
        "compile",
        "compile_channels_last",
    ]
    assert contenders.dense_layouts(dataclasses.replace(config, net="wide-mlp")) == [
        "contiguous",
        "compile",
    ]
    chosen, timings, rejected = contenders.choose_dense(config, batch(config))
    assert set(timings) == {"contiguous", "channels_last"}
    assert timings[chosen].median == min(t.median for t in timings.values())
    assert rejected == dict.fromkeys(
        ("compile", "compile_channels_last"), "RuntimeError: no C++ compiler"
    )
    with pytest.raises(WorkbenchError, match=r"no C\+\+ compiler.*--dense-baseline contiguous"):
        only = dataclasses.replace(config, dense_baseline="compile")
        contenders.choose_dense(only, batch(config))


def test_peak_memory_is_the_childs_own_not_that_of_who_started_it() -> None:
    config = dataclasses.replace(SMALL, batch_size=16)
    held = b"\1" * (400 << 20)
    peak = networks._peak(config, "sparse")
    # lenet-300-100 has a megabyte of weights; ru_maxrss, inherited, would say hundreds.
    assert 0 < peak < 50e6 < len(held)


def test_peak_memory_is_of_a_dense_layout_that_is_not_compiled() -> None:
    seconds = {"sparse": 1.0, "sparse, signal": 1.0, "contiguous": 3.0, "channels_last": 2.0}
    timings = {name: {"median": value} for name, value in seconds.items()}
    timings["compile_channels_last"] = {"median": 0.5}
    assert networks._eager_dense(timings) == "channels_last"
    del timings["contiguous"], timings["channels_last"]
    assert networks._eager_dense(timings) == "contiguous"


def test_a_new_drive_keeps_the_masks_and_lets_the_old_one_go() -> None:
    contender = contenders.build_sparse(SMALL, 0, 100, 100)
    first, keys = contender.masking, contender.model[1].pattern.keys()
    contenders.drive(contender, 0, 1000, 3)
    assert contender.masking is not first and first is not None
    with pytest.raises(RuntimeError, match="closed"):
        first.step()
    assert torch.equal(contender.model[1].pattern.keys(), keys)
    for _ in range(3):
        contender.step(*batch())
    assert contender.masking is not None and contender.masking.updates == 1
