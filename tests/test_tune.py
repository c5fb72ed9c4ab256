"""tune: storages as the measurement dictates, break-evens that mask updates go by, the account."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import sparse_kernels
from sparse_kernels import SparseConv2d, SparseLinear, SparseMomentum, sparsify, tune
from sparse_kernels.layout import to_feature_major
from sparse_kernels.nn import _tune_problem
from sparse_kernels.nn import tune as planning
from sparse_kernels.nn.base import COMPRESSED, DENSE_MASKED, DENSE_MASKED_ABOVE
from sparse_kernels.nn.tune import break_even_density
from sparse_kernels.plan_measure import Measured
from sparse_kernels.plan_variants import RULE

ROOT = Path(sparse_kernels.__file__).resolve().parents[1]


class FakeTimes:
    """Stands in for ``measure``: dense-masked takes 1 s, compressed density / break-even seconds.

    Each call runs once, so that a broken candidate shows.
    """

    def __init__(self) -> None:
        self.break_even, self.settled, self.best_format = 0.2, "certain", "channels_last"
        self.densities: list[float] = []
        self.races = 0
        self.quick = ""  # the variant that takes half of the rule's time
        self.variant_races = 0

    def __call__(self, candidates, *, seconds):
        if RULE in candidates:
            return self.variants(candidates)
        self.races += 1
        times = {}
        for name, call in candidates.items():
            call()
            times[name] = 1.0 if name in (self.best_format, "contiguous") else 1.5
            if name == COMPRESSED:
                self.densities.append(call.module.density)
                times[name] = call.module.density / self.break_even
        samples = {name: [time] * 7 for name, time in times.items()}
        return Measured(times, samples, min(times, key=times.get), self.settled)

    def variants(self, candidates):
        self.variant_races += 1
        times = {name: 0.5 if name == self.quick else 1.0 for name in candidates}
        for call in candidates.values():
            call()
        samples = {name: [time] * 7 for name, time in times.items()}
        best = self.quick if self.quick in candidates else RULE
        return Measured(times, samples, best, "certain")


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """``tune`` on made-up times and with a cache of its own."""
    monkeypatch.setenv("SPARSE_KERNELS_CACHE", str(tmp_path))
    monkeypatch.delenv("SPARSE_KERNELS_TUNE", raising=False)
    times = FakeTimes()
    monkeypatch.setattr(
        planning, "plan_layers", functools.partial(planning.plan_layers, measure=times)
    )
    return times


def small_net(density=0.1) -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Flatten(),
        nn.Linear(8 * 36, 10),
    )
    sparsify(model, density=density, generator=torch.Generator().manual_seed(0))
    return model


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("density", "storage"), [(0.1, COMPRESSED), (0.4, DENSE_MASKED)])
@pytest.mark.parametrize("training", [True, False])
def test_storages_are_what_the_times_say(fake, density, storage, training) -> None:
    model = small_net(density)
    expected, values = model.eval()(X), [model[i].values for i in (0, 3, 5)]
    report = tune(model.train(), X, training=training)
    assert [row.chosen for row in report] == [storage] * 3 == [model[i].storage for i in (0, 3, 5)]
    assert [model[i].values for i in (0, 3, 5)] == values or all(
        model[i].values is value for i, value in zip((0, 3, 5), values, strict=True)
    )
    for row in report:
        assert row.break_even == pytest.approx(0.2, rel=0.05)
        assert row.source == "measured" and row.settled == "certain"
    torch.testing.assert_close(model.eval()(X), expected, check_stride=False)
    assert report["3"].input_shape == (4, 8, 8, 8)
    assert len(str(report).splitlines()) == 4 and "dense-masked" in str(report)
    with pytest.raises(KeyError, match="there are 0, 3, 5"):
        report["1"]


def test_the_run_on_the_example_leaves_no_trace(fake) -> None:
    model = nn.Sequential(small_net(), nn.Dropout())
    model[0][1].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    tune(model, X)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_what_was_measured_once_comes_from_the_cache(fake) -> None:
    first = tune(small_net(), X)
    races = fake.races
    again = tune(small_net(), X)
    assert fake.races == races and [row.source for row in again] == ["cache"] * 3
    assert [row.break_even for row in again] == [row.break_even for row in first]
    tune(small_net(), X, cache=False)
    assert fake.races == 2 * races
    # Another density of the same layers: one race each, the break-even is known.
    fake.races = 0
    other = tune(small_net(0.4), X)
    assert fake.races == 3 and [row.chosen for row in other] == [DENSE_MASKED] * 3


def test_equal_layers_are_measured_once_and_undecided_ones_again(fake) -> None:
    fake.settled = "time"

    def run():
        # The first gets a contiguous input, the others the feature-major output before them.
        model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(4)))
        sparsify(model, density=0.5)
        return tune(model, torch.randn(4, 16).requires_grad_())

    report = run()
    assert "undecided" in str(report)
    assert [row.source for row in report] == ["measured"] * 2 + ["cache"] * 2
    races = fake.races
    run()
    assert fake.races == 2 * races


def test_the_faster_image_format_is_taken(fake) -> None:
    fake.best_format = ""  # channels_last now takes 1.5, contiguous 1
    model = small_net(0.4)
    report = tune(model, X)
    assert model[0].image_format == report["0"].image_format == "contiguous"
    model(X).sum().backward()


def test_layouts_seen_and_own(fake) -> None:
    model = small_net()
    seen = _tune_problem.problems(model, X, True, "seen")
    assert [p.order for p in seen.values()] == ["contiguous", "feature-major", "feature-major"]
    assert [p.input_gradient for p in seen.values()] == [False, True, True]
    own = _tune_problem.problems(model, X, False, "own")
    assert {p.order for p in own.values()} == {"own"}
    assert not any(p.input_gradient for p in own.values())
    assert len({p.key() for p in [*seen.values(), *own.values()]}) == 6
    tune(model, to_feature_major(X), layout="own")


def test_a_layer_that_is_not_called_keeps_what_it_has(fake) -> None:
    model = nn.ModuleDict({"used": SparseLinear(8, 8, density=0.9), "idle": SparseLinear(8, 8)})
    model.forward = lambda x: model["used"](x)  # type: ignore[method-assign]
    report = tune(model, {"x": torch.randn(3, 8)})
    assert (report["used"].chosen, report["idle"].chosen) == (DENSE_MASKED, COMPRESSED)
    assert report["idle"].source == "not called" and report["idle"].input_shape == ()
    assert model["idle"].dense_above == DENSE_MASKED_ABOVE


@pytest.mark.parametrize("off", ["0", "off"])
def test_without_tuning_the_rule_decides(fake, monkeypatch, off) -> None:
    monkeypatch.setenv("SPARSE_KERNELS_TUNE", off)
    report = tune(small_net(0.4), X)
    assert [row.chosen for row in report] == [COMPRESSED] * 3 and fake.races == 0
    assert [row.source for row in report] == ["rule"] * 3
    layer = SparseLinear(8, 8, density=0.6)
    assert tune(layer, torch.randn(2, 8))[""].chosen == DENSE_MASKED


# ---------------------------------------------------------------- optimizers and mask updates


def make_optimizer(kind, model):
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def step(model, optimizer) -> None:
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_optimizer_state_moves_along(fake, kind) -> None:
    plain, tuned = small_net(0.4), small_net(0.4)
    tuned.load_state_dict(plain.state_dict())
    optimizers = [make_optimizer(kind, model) for model in (plain, tuned)]
    for _ in range(2):
        for model, optimizer in zip((plain, tuned), optimizers, strict=True):
            step(model, optimizer)
    report = tune(tuned, X, optimizer=optimizers[1])
    assert [row.chosen for row in report] == [DENSE_MASKED] * 3
    for _ in range(3):
        for model, optimizer in zip((plain, tuned), optimizers, strict=True):
            step(model, optimizer)
    for i in (0, 3, 5):
        torch.testing.assert_close(plain[i].weight, tuned[i].weight, rtol=1e-4, atol=1e-5)
        assert not tuned[i].values[~tuned[i].mask].any()


def test_an_optimizer_made_before_needs_no_mention_until_it_has_stepped(fake) -> None:
    model = small_net(0.4)
    optimizer = make_optimizer("sgd", model)
    tune(model, X)
    step(model, optimizer)
    assert optimizer.state[model[5].values]["momentum_buffer"].shape == model[5].values.shape


def test_state_under_a_sparse_momentum_moves_without_being_named(fake) -> None:
    model = small_net(0.4)
    optimizer = make_optimizer("sgd", model)
    masks = SparseMomentum(model, optimizer, total_steps=20, update_every=4, signal="exact")
    for i in range(12):
        step(model, optimizer)
        masks.step()
        if i == 1:
            tune(model, X)
            assert model[0].storage == DENSE_MASKED
    assert masks.updates == 3
    with pytest.raises(ValueError, match="another optimizer"):
        tune(model, X, optimizer=make_optimizer("sgd", model))
    masks.close()


@pytest.mark.parametrize(
    ("before", "break_even", "after"),
    [
        (COMPRESSED, 0.2, DENSE_MASKED),
        (COMPRESSED, 0.35, COMPRESSED),
        (DENSE_MASKED, 0.35, DENSE_MASKED),  # between 0.8 of the break-even and itself: as it was
        (DENSE_MASKED, 0.6, COMPRESSED),
    ],
)
def test_mask_updates_go_by_the_layers_own_break_even(before, break_even, after) -> None:
    model = small_net(0.3)
    for i in (0, 3, 5):
        model[i].to_storage_(before).dense_above = break_even
    optimizer = make_optimizer("sgd", model)
    masks = SparseMomentum(model, optimizer, total_steps=40, update_every=4, redistribution="none")
    storages = []
    for _ in range(13):
        step(model, optimizer)
        masks.step()
        storages.append([model[i].storage for i in (0, 3, 5)])
    assert storages[2] == [before] * 3  # frozen until an update
    assert storages[4:] == [[after] * 3] * 9  # and no flipping at the next ones


def test_a_given_dense_above_overrides_the_measured_one() -> None:
    model = small_net(0.3)
    for i in (0, 3, 5):
        model[i].dense_above = 0.1
    optimizer = make_optimizer("sgd", model)
    masks = SparseMomentum(model, optimizer, total_steps=40, update_every=1, dense_above=1.0)
    step(model, optimizer)
    assert masks.step() is not None and model[0].storage == COMPRESSED


def test_state_dict_round_trip(fake) -> None:
    model = small_net(0.4)
    tune(model, X)
    other = small_net(0.1)
    other.load_state_dict(model.state_dict())
    assert [other[i].storage for i in (0, 3, 5)] == [DENSE_MASKED] * 3
    torch.testing.assert_close(other.eval()(X), model.eval()(X))
    # The break-even is a fact about this machine: it stays with the layer, not with the weights.
    assert other[0].dense_above == DENSE_MASKED_ABOVE != model[0].dense_above
    assert not any("dense_above" in name for name in model.state_dict())
    assert copy.deepcopy(model)[0].dense_above == model[0].dense_above


# ---------------------------------------------------------------- break-even, errors, real times


@pytest.mark.parametrize("start", [0.006, 0.05, 0.3, 0.9])
@pytest.mark.parametrize("even", [0.02, 0.1, 0.33, 0.7])
@pytest.mark.parametrize("fixed", [0.0, 0.3])
def test_break_even_of_a_straight_line(start, even, fixed) -> None:
    probes = []

    def ratio_at(density):
        probes.append(density)
        return 1.03 * (fixed + (1 - fixed) * density / even)

    found = break_even_density(ratio_at, {start: ratio_at(start)})
    assert found == pytest.approx(even, rel=0.1)
    assert len(probes) <= planning.MAX_PROBES + 1 and all(0 < p <= 1 for p in probes)


def test_break_even_at_the_ends() -> None:
    assert break_even_density(lambda d: 0.5, {0.1: 0.5}) == 1.0
    assert break_even_density(lambda d: 4.0, {0.1: 4.0}) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "nchw"}, "layout must be 'seen' or 'own'"),
        ({"seconds": 0}, "seconds must be positive"),
        ({"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters())}, "does not hold"),
    ],
)
def test_bad_arguments_are_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        tune(small_net(), X, **arguments)


def test_models_that_cannot_be_tuned_are_refused() -> None:
    with pytest.raises(ValueError, match="no sparse layer"):
        tune(nn.Linear(3, 3), torch.randn(2, 3))
    with pytest.raises(ValueError, match="on meta"):
        tune(SparseLinear(3, 3, device="meta"), torch.randn(2, 3))


def test_with_the_real_clock(monkeypatch, tmp_path) -> None:
    """No time is asserted: every candidate runs, and the facts make sense."""
    monkeypatch.setenv("SPARSE_KERNELS_CACHE", str(tmp_path))
    model = nn.Sequential(
        SparseConv2d(4, 6, 3, padding="same", density=0.5, block=(2, 2)),
        nn.Flatten(),
        SparseLinear(6 * 36, 5, density=0.02, bias=False),
    )
    report = tune(model, torch.randn(2, 4, 6, 6), seconds=0.02)
    for row in report:
        assert min(row.compressed_ms, row.dense_masked_ms, row.dense_ms) > 0
        assert 0 <= row.break_even <= 1
        # The decision and the break-even agree, so the next mask update does not undo it.
        assert (row.chosen == DENSE_MASKED) == (row.density > row.break_even)


def test_ranks_of_one_job_agree(tmp_path) -> None:
    """Each rank sees other times; both must store alike.  Run outside of the source tree, whose
    package would come first."""
    script = textwrap.dedent(
        """
        import sys, torch, torch.distributed as dist
        from sparse_kernels import SparseLinear, tune
        rank = int(sys.argv[1])
        dist.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=2)
        layer = SparseLinear(8, 8, density=0.9 if rank == 0 else 0.3)
        row = tune(layer, torch.randn(2, 8))[""]  # by rule: the densities differ
        storages = [None, None]
        dist.all_gather_object(storages, row.chosen)
        assert storages == ["dense-masked"] * 2, storages
        try:  # what fails on rank 0 is an error everywhere, not a rank that waits for ever
            tune(layer, torch.randn(2, 7 if rank == 0 else 8))
            raise SystemExit("no error")
        except (ValueError, RuntimeError) as error:
            assert ("rank 0" in str(error)) == (rank == 1), error
        dist.destroy_process_group()
        """
    )
    environment = {**os.environ, "SPARSE_KERNELS_TUNE": "off", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    place = f"file://{tmp_path}/meeting"
    ranks = [
        subprocess.Popen(
            [*command, str(rank), place], env=environment, cwd=tmp_path, stderr=subprocess.PIPE
        )
        for rank in range(2)
    ]
    outputs = []  # of both, before the first failure: a rank left behind would outlive the test
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        outputs.append(errors.decode())
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
