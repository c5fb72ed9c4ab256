"""Every named method does to the masks what its paper says."""

from __future__ import annotations

import copy
import math
import random
from types import SimpleNamespace

import pytest
import torch
from small_training import make_model, sparse, stored, train
from torch import nn

from sparse_kernels import SparseMomentum, sparsify
from sparse_kernels.nn.distribution import LayerSize, erk_densities
from sparse_kernels.training import METHODS, SparseMomentumConfig, method, rules
from sparse_kernels.training.apply_change import STORAGE_HYSTERESIS
from sparse_kernels.training.limits import shared
from sparse_kernels.training.signals import SIGNALS
from sparse_kernels.training.update import regain
from sparse_kernels.workbench.config import TrainConfig, method_settings

STEPS, EVERY = 40, 4


pytestmark = pytest.mark.usefixtures("one_thread")


def trained(name: str, **more):
    torch.manual_seed(0)
    chosen = method(name)
    model = make_model(density=chosen.start_density or 0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"signal": "exact", **chosen.options, **more}
    masks = SparseMomentum(model, optimizer, total_steps=STEPS, update_every=EVERY, **options)
    first = [layer.pattern.keys().clone() for layer in sparse(model)]
    counts = []
    masks.on_update = lambda record: counts.append(tuple(record.nnz_after.values()))
    total = stored(model)
    train(model, optimizer, masks, STEPS)
    return model, masks, first, counts, total


@pytest.mark.parametrize("name", [n for n in METHODS if n != "gmp"])
def test_every_method_trains_and_conserves_the_total(name) -> None:
    model, _, first, counts, total = trained(name)
    assert {sum(c) for c in counts} == {total} and stored(model) == total
    moved = any(
        not torch.equal(k, layer.pattern.keys())
        for k, layer in zip(first, sparse(model), strict=True)
    )
    assert moved is (name != "static")
    spread = name in ("sparse-momentum", "momentum-neuron", "dsr")
    before = tuple(k.numel() for k in first)
    assert any(c != before for c in counts) is spread  # the others hold each layer's number


def test_static_masks_never_move_and_need_no_dense_gradient() -> None:
    _, masks, _, _, _ = trained("static")
    assert masks.config.effective_signal == "random"
    assert all(record.removed == 0 for record in masks.history) and masks.history


def test_rigl_decays_to_nothing_and_stops_at_three_quarters() -> None:
    _, masks, _, _, _ = trained("rigl")
    assert [record.step for record in masks.history] == [4, 8, 12, 16, 20, 24, 28]
    for record in masks.history:  # alpha / 2 (1 + cos(t pi / T_end)) of the paper
        expected = 0.3 / 2 * (1 + math.cos(record.step * math.pi / 30))
        assert record.prune_rate == pytest.approx(expected)
    assert masks.finished and masks.config.effective_signal == "gradient"


def test_set_prunes_a_constant_share_by_sign() -> None:
    _, masks, _, _, _ = trained("set")
    assert {record.prune_rate for record in masks.history} == {0.3}
    assert masks.config.prune == "set" and masks.config.effective_signal == "random"


@pytest.mark.parametrize("name", METHODS)
def test_only_sparse_momentum_spares_nearly_dense_layers(name) -> None:
    """Its official code does; the rate of the others holds in every layer."""
    model = make_model(density=0.9, sizes=(12, 20, 16, 4))
    with torch.no_grad():
        for i, layer in enumerate(sparse(model)):
            layer.values.mul_(10.0**-i)  # unequal layers, by weights and by gradients
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {**method(name).options, "signal": "exact", "prune_rate": 0.5, "update_until": 1.0}
    masks = SparseMomentum(model, optimizer, total_steps=STEPS, update_every=EVERY, **options)
    before = [layer.pattern.nnzb for layer in sparse(model)]
    train(model, optimizer, masks, EVERY)
    rate = masks.history[0].prune_rate
    full = sum(math.ceil(rate * n) for n in before)
    spares = name in ("sparse-momentum", "momentum-neuron", "snfs")
    assert (masks.history[0].removed < full) is spares
    assert spares or masks.history[0].removed == full
    command = TrainConfig(**method_settings(name)).command()
    assert ("--no-spare-dense" in command) is not spares


def test_dsr_prunes_globally_and_regrows_by_what_layers_hold() -> None:
    _, masks, _, counts, _ = trained("dsr")
    assert len(set(counts)) > 1
    assert masks.config.redistribution == "survivors"
    rule_set = SparseMomentumConfig(10, 1, **method("dsr").options).rule_set()
    layers = [SimpleNamespace(name=name, nnz=100, blocks=1000) for name in "ab"]
    grown, _ = regain(layers, [99, 1], [0.5, 0.5], rule_set, None)
    assert grown == [1, 99]


def test_gradual_pruning_follows_the_cubic_to_the_very_end() -> None:
    model, masks, first, counts, total = trained("gmp", final_density=0.1)
    assert total == sum(layer.matrix_shape[0] * layer.matrix_shape[1] for layer in sparse(model))
    last = 28  # the last multiple of 4 before 30 = 0.75 * 40
    for record in masks.history:
        for start, (name, found) in zip(first, record.nnz_after.items(), strict=True):
            size, final = start.numel(), round(0.1 * start.numel())
            expected = final + (size - final) * (1 - record.step / last) ** 3
            assert abs(found - expected) <= 0.5 + 1e-9, (record.step, name)
    assert masks.history[-1].step == last
    assert counts[-1] == tuple(round(0.1 * k.numel()) for k in first)
    assert all(layer.storage == "compressed" for layer in sparse(model))
    assert STORAGE_HYSTERESIS * 0.5 > 0.1  # so that they had to come from dense storage


@pytest.mark.parametrize("redistribution", ["none", "momentum", "nonzero"])
@pytest.mark.parametrize("rule", ["magnitude", "global_magnitude"])
def test_gradual_pruning_with_regrowth_ends_at_its_density(rule, redistribution) -> None:
    """GraNet: gradual pruning, and a share pruned and regrown beside it."""
    model, masks, _, counts, _ = trained(
        "gmp", final_density=0.2, prune_rate=0.3, growth="gradient", prune=rule,
        redistribution=redistribution,
    )  # fmt: skip
    wanted = [round(0.2 * x.matrix_shape[0] * x.matrix_shape[1]) for x in sparse(model)]
    assert stored(model) == sum(wanted)
    totals = [sum(c) for c in counts]
    assert totals == sorted(totals, reverse=True)
    alone = rule == "magnitude" and redistribution == "none"
    assert (list(counts[-1]) == wanted) is alone  # else layers end at densities of their own
    assert masks.history[-1].removed > 0


def test_gradual_pruning_keeps_the_proportions_of_its_start() -> None:
    model = nn.Sequential(nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 5))
    sparsify(model, density={"0": 0.2, "2": 0.8})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"total_steps": 9, "update_every": 2, "final_density": 0.1}
    masks = SparseMomentum(model, optimizer, **options, prune_rate=0.0, redistribution="none")
    assert [layer.nnz for layer in sparse(model)] == [80, 80]
    for _ in range(9):
        optimizer.zero_grad()
        model(torch.randn(4, 20)).square().mean().backward()
        optimizer.step()
        masks.step()
    assert [layer.nnz for layer in sparse(model)] == [25, 25]


def test_gradual_pruning_of_sparse_momentum_ends_at_its_density() -> None:
    model = trained("sparse-momentum", final_density=0.2)[0]
    wanted = sum(round(0.2 * x.matrix_shape[0] * x.matrix_shape[1]) for x in sparse(model))
    assert stored(model) == wanted


def test_gradual_pruning_leaves_frozen_layers_out_of_the_sum() -> None:
    torch.manual_seed(0)
    model = make_model(density=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"total_steps": STEPS, "update_every": EVERY, "final_density": 0.2}
    masks = SparseMomentum(model, optimizer, **options)
    still, *others = sparse(model)
    still.values.requires_grad_(False)
    train(model, optimizer, masks, STEPS)
    assert still.density == 1.0
    wanted = sum(round(0.2 * x.matrix_shape[0] * x.matrix_shape[1]) for x in others)
    assert sum(x.pattern.nnzb for x in others) == wanted


def test_what_is_lost_for_good_is_shared_exactly() -> None:
    draw = random.Random(0)
    for _ in range(200):
        over = [draw.randrange(-20, 30) for _ in range(draw.randrange(1, 6))]
        positive = [max(0, o) for o in over]
        counts = shared(sum(over), over)
        assert sum(counts) == max(0, sum(over))
        for count, most in zip(counts, positive, strict=True):
            exact = most * max(0, sum(over)) / max(1, sum(positive))
            assert count <= most and abs(count - exact) < 1
    assert shared(3, [2, 2, 2, -3]) == [1, 1, 1, 0] and shared(4, [3, 3, -2]) == [2, 2, 0]


def test_gradual_pruning_goes_on_from_a_checkpoint() -> None:
    def setup():
        model = make_model(density=1.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        options = {**method("gmp").options, "final_density": 0.1}
        return (
            model,
            optimizer,
            SparseMomentum(model, optimizer, total_steps=STEPS, update_every=EVERY, **options),
        )

    model, optimizer, masks = setup()
    train(model, optimizer, masks, 18)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), masks.state_dict()))
    again, other, driver = setup()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    driver.load_state_dict(saved[2])
    train(model, optimizer, masks, STEPS, skip=18)
    train(again, other, driver, STEPS, skip=18)
    for a, b in zip(sparse(model), sparse(again), strict=True):
        assert torch.equal(a.pattern.keys(), b.pattern.keys())
        assert a.pattern.nnzb == round(0.1 * a.matrix_shape[0] * a.matrix_shape[1])


def test_erdos_renyi_counts_channels_alone() -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(64, 32))
    sparsify(model, density=0.3, distribution="er", generator=torch.Generator().manual_seed(0))
    sizes = [LayerSize((16, 8), 16 * 8 * 9), LayerSize((32, 64), 32 * 64)]
    for layer, density in zip((model[0], model[2]), erk_densities(sizes, 0.3), strict=True):
        assert layer.density == pytest.approx(density, abs=1 / 1000)
    assert round(0.3 * (16 * 8 * 9 + 32 * 64)) == model[0].nnz + model[2].nnz


def test_growth_by_neuron_needs_a_signal() -> None:
    with pytest.raises(ValueError, match="growth='neuron' ranks rows by a dense signal"):
        SparseMomentumConfig(total_steps=4, update_every=1, growth="neuron", signal="random")
    for growth in ("fan_in", "groups:4"):  # draw at random instead
        SparseMomentumConfig(
            total_steps=4, update_every=1, growth=growth, signal="random", redistribution="none"
        )


@pytest.mark.parametrize("signal", SIGNALS)
def test_growth_by_gradient_is_so_whatever_the_signal(signal: str) -> None:
    config = SparseMomentumConfig(total_steps=4, update_every=1, growth="gradient", signal=signal)
    assert config.effective_signal == "gradient" and config.rule_set().growth is rules.grow_largest
    config = SparseMomentumConfig(total_steps=4, update_every=1, signal=signal)
    grows = rules.grow_random if signal == "random" else rules.grow_largest
    assert config.effective_signal == signal and config.rule_set().growth is grows


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown method 'rigel'; expected one of sparse-mom"):
        method("rigel")
    for bad in ({"update_until": 0.0}, {"final_density": 2.0}, {"cost_weight": -1.0},
                {"cost_budget": "end"}, {"prune": "groups:0"}, {"growth": "fanin"},
                {"growth": "groups:4"}, {"final_density": 0.1, "update_until": 0.25},
                {"redistribution": "none", "prune": "global_magnitude", "growth": "groups:4"},
                {"final_density": 0.1, "redistribution": "none", "growth": "groups:4"},
                ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(bad))):
            SparseMomentumConfig(total_steps=4, update_every=1, **bad)


def test_a_training_too_short_for_an_update_says_so(caplog) -> None:
    for name, told in (("rigl-itop", True), ("static", False)):
        caplog.clear()
        SparseMomentumConfig(total_steps=4000, update_every=4000, **method(name).options)
        assert ("no mask update falls into 4000 steps" in caplog.text) is told


@pytest.mark.parametrize(("until", "steps"), [(0.55, 55), (0.75, 75), (1.0, 100), (0.001, 1)])
def test_masks_stay_after_a_share_of_the_steps(until: float, steps: int) -> None:
    config = SparseMomentumConfig(total_steps=100, update_every=1, update_until=until)
    assert config.schedule().total_steps == steps
