"""SparseMomentum beside other things: discarded batches, compilation, frozen layers, a second
driver, overlapping windows, averaged models.
"""

from __future__ import annotations

import gc
import logging

import pytest
import torch
from small_training import batches, make_model, sparse, stored, train
from torch import nn
from torch.optim.swa_utils import AveragedModel

from sparse_kernels.training import SparseMomentum
from sparse_kernels.training.signals import LayerSignal


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.9, **options})


def weights(model):
    return torch.cat([layer.dense_matrix().detach().flatten() for layer in sparse(model)])


# ---- batches that are discarded ------------------------------------------------------------------


def train_with_a_discarded_batch(factor, discard, signal="exact", forward=None):
    """20 steps; before step 6 a batch whose loss is multiplied by `factor` goes to waste."""
    model = make_model()
    run = forward(model) if forward else model
    optimizer = sgd(model)
    masks = SparseMomentum(model, optimizer, total_steps=20, update_every=4, signal=signal)
    for i, (x, y) in enumerate(batches(20)):
        if i == 6 and factor is not None:
            optimizer.zero_grad()
            (factor * nn.functional.cross_entropy(run(x.flip(0)), y)).backward()
            assert sparse(model)[0].probe.grad is not None
            discard(optimizer, masks)
        loss = nn.functional.cross_entropy(run(x), y)
        optimizer.zero_grad()  # between forward and backward: legal, and hard on forward hooks
        loss.backward()
        optimizer.step()
        masks.step()
    assert masks.steps == 20
    return weights(model)


DISCARDS = {
    "zero_grad": lambda optimizer, masks: optimizer.zero_grad(),
    "nothing yet": lambda optimizer, masks: None,  # the loop's own zero_grad comes next
    "told": lambda optimizer, masks: (
        optimizer.zero_grad(set_to_none=False),
        masks.step(skipped=True),
    ),
}


@pytest.mark.parametrize("signal", ["exact", "window"])
@pytest.mark.parametrize("how", DISCARDS)
@pytest.mark.parametrize("factor", [1.0, float("nan")])
def test_a_discarded_batch_leaves_no_trace(factor, how, signal):
    plain = train_with_a_discarded_batch(None, None, signal)
    found = train_with_a_discarded_batch(factor, DISCARDS[how], signal)
    assert torch.equal(found, plain)


# Dynamo itself instantiates autograd Functions and warns of that.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_discarding_works_in_a_compiled_model_in_one_graph():
    torch._dynamo.reset()

    def compiled(model):
        return torch.compile(model, backend="aot_eager", fullgraph=True)

    plain = train_with_a_discarded_batch(None, None, "window")
    found = train_with_a_discarded_batch(float("nan"), DISCARDS["zero_grad"], "window", compiled)
    torch.testing.assert_close(found, plain)


def test_a_step_without_gradients_takes_none():
    model = make_model()
    optimizer = sgd(model)
    masks = SparseMomentum(model, optimizer, total_steps=20, update_every=10, signal="exact")
    x, y = next(iter(batches(1)))
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.zero_grad()
    optimizer.step()
    masks.step()
    assert all(not s.buffers and s.layer.probe.grad is None for s in masks._signals)


def test_micro_batches_add_up_in_the_probe():
    model = make_model()
    masks = SparseMomentum(model, sgd(model), total_steps=20, update_every=10, signal="exact")
    x, y = next(iter(batches(1)))
    first, second = (
        nn.functional.cross_entropy(model(x[part]), y[part])
        for part in (slice(10), slice(10, None))
    )
    first.backward()
    second.backward()
    assert masks.steps == 0
    for layer in sparse(model):
        dense = layer.pattern.compress(layer.probe.grad)
        torch.testing.assert_close(dense, layer.values.grad)


def test_a_probe_renewed_by_a_move_is_still_watched():
    model = make_model(dtype=torch.float32)
    optimizer = sgd(model)
    masks = SparseMomentum(model, optimizer, total_steps=20, update_every=10, signal="exact")
    model.double()
    for count in (1, 2):
        train(model, optimizer, masks, 1)
        x, y = next(iter(batches(1)))
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.zero_grad()
        assert all(s.gathered == count for s in masks._signals)


# ---- frozen layers -------------------------------------------------------------------------------


def test_frozen_layers_keep_their_pattern_and_hold_no_budget(caplog):
    model = make_model()
    model[2].requires_grad_(False)
    optimizer = torch.optim.SGD(
        filter(lambda p: p.requires_grad, model.parameters()), lr=0.1, momentum=0.9
    )
    keys, values = model[2].pattern.keys().clone(), model[2].values.detach().clone()
    free = model[0].pattern.nnzb + model[4].pattern.nnzb
    with caplog.at_level(logging.INFO, logger="sparse_kernels.training"):
        masks = SparseMomentum(model, optimizer, total_steps=20, update_every=4, signal="exact")
        train(model, optimizer, masks, 20)
    assert masks.frozen == ("2",) and masks.updates == 4
    assert caplog.text.count("frozen sparse layers keep their pattern: 2") == 1
    assert torch.equal(model[2].pattern.keys(), keys) and torch.equal(model[2].values, values)
    assert model[2].probe is None
    assert model[0].pattern.nnzb + model[4].pattern.nnzb == free
    assert set(masks.history[0].nnz_after) == {"0", "4"}


@pytest.mark.parametrize("prune", ["magnitude", "global_magnitude"])
def test_frozen_layers_in_the_optimizer_are_left_alone_too(prune):
    model = make_model()
    model[2].values.requires_grad_(False)
    optimizer = sgd(model)
    before, keys = stored(model), model[2].pattern.keys().clone()
    masks = SparseMomentum(
        model, optimizer, total_steps=20, update_every=4, prune=prune, signal="exact"
    )
    train(model, optimizer, masks, 20)
    assert torch.equal(model[2].pattern.keys(), keys) and stored(model) == before


def test_a_layer_frozen_in_mid_training_is_left_out_until_it_is_trained_again():
    model = make_model()
    optimizer = sgd(model)
    masks = SparseMomentum(model, optimizer, total_steps=40, update_every=4, signal="exact")
    train(model, optimizer, masks, 6)
    model[2].requires_grad_(False)
    keys = model[2].pattern.keys().clone()
    train(model, optimizer, masks, 14, skip=6)
    assert masks.frozen == ("2",) and torch.equal(model[2].pattern.keys(), keys)
    assert model[2].probe is None and not masks._signals[1].buffers
    model[2].requires_grad_(True)
    train(model, optimizer, masks, 40, skip=14)
    assert masks.frozen == () and not torch.equal(model[2].pattern.keys(), keys)


def test_a_model_with_frozen_layers_only_is_refused():
    model = make_model().requires_grad_(False)
    optimizer = sgd(model)
    with pytest.raises(ValueError, match="no sparse layer to train.*unfreeze some"):
        SparseMomentum(model, optimizer, total_steps=9, update_every=3, signal="exact")


# ---- one driver per layer ------------------------------------------------------------------------


def test_a_second_driver_is_refused_until_the_first_is_closed_or_gone():
    model = make_model()
    optimizer = sgd(model)
    options = {"total_steps": 20, "update_every": 4, "signal": "exact"}
    first = SparseMomentum(model, optimizer, **options)
    with pytest.raises(ValueError, match="layer '0' is already driven.*call close"):
        SparseMomentum(model, optimizer, **options)
    with pytest.raises(ValueError, match="already driven"):
        SparseMomentum(model[2], torch.optim.SGD(model[2].parameters(), lr=0.1), **options)
    first.close()
    first.close()
    with pytest.raises(RuntimeError, match="closed SparseMomentum"):
        first.step()
    second = SparseMomentum(model, optimizer, **options)
    probe = model[0].probe
    first.close()  # no longer its layers
    assert model[0].probe is probe is not None
    train(model, optimizer, second, 6)
    assert second.updates == 1 and second._signals[0].gathered == 6
    del second, probe
    gc.collect()
    assert model[0].probe is None and not model[0].values._backward_hooks
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    third = SparseMomentum(model, optimizer, **options)
    train(model, optimizer, third, 6)
    assert third.updates == 1


def test_a_refused_construction_owns_nothing():
    model = make_model()
    with pytest.raises(ValueError, match="does not hold"):
        SparseMomentum(model, sgd(nn.Linear(2, 2)), total_steps=9, update_every=3, signal="exact")
    masks = SparseMomentum(model, sgd(model), total_steps=9, update_every=3, signal="exact")
    assert len(masks._signals) == 3


def test_a_probe_taken_away_is_noticed_at_the_update():
    model = make_model()
    optimizer = sgd(model)
    masks = SparseMomentum(model, optimizer, total_steps=20, update_every=4, signal="exact")
    model[2].probe = None
    with pytest.warns(RuntimeWarning, match="no gradient reached the growth signal of '2'"):
        train(model, optimizer, masks, 4)


# ---- windows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_window_that_reaches_over_the_last_update_is_exact(name):
    """22 steps are needed and updates come every 3: nothing may be dropped at an update."""
    results = []
    for signal in ("exact", "window"):
        model = make_model()
        make = {"sgd": sgd, "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01)}[name]
        optimizer = make(model)
        masks = SparseMomentum(model, optimizer, total_steps=40, update_every=3, signal=signal)
        assert signal == "exact" or masks._signals[0].length() == 22
        train(model, optimizer, masks, 40)
        assert masks.updates == 13
        results.append([(r.nnz_after, r.removed) for r in masks.history])
        results.append(weights(model))
    assert results[0] == results[2]
    torch.testing.assert_close(results[1], results[3])


def armings(monkeypatch):
    """A list that grows by one whenever probes are looked at for layer "0"."""
    calls, arm = [], LayerSignal.arm

    def counted(self, schedule, next_step, sampling=None):
        if self.name == "0":
            calls.append(next_step)
        arm(self, schedule, next_step, sampling)

    monkeypatch.setattr(LayerSignal, "arm", counted)
    return calls


@pytest.mark.parametrize(
    ("signal", "expected"),
    [
        ("exact", [1, 11, 21]),
        ("window", [1, 7, 11, 17, 21]),  # momentum 0.5: 4 steps
        ("gradient", [1, 10, 11, 20, 21]),
        ("random", [1, 11, 21]),
    ],
)
def test_probes_are_looked_at_only_when_they_change(monkeypatch, signal, expected):
    calls = armings(monkeypatch)
    model = make_model()
    optimizer = sgd(model, momentum=0.5)
    masks = SparseMomentum(model, optimizer, total_steps=30, update_every=10, signal=signal)
    train(model, optimizer, masks, 30)
    assert calls == expected and masks.updates == 2


def test_a_change_of_momentum_moves_the_window(monkeypatch):
    calls = armings(monkeypatch)
    model = make_model()
    optimizer = sgd(model, momentum=0.5)
    masks = SparseMomentum(model, optimizer, total_steps=90, update_every=40, signal="window")
    train(model, optimizer, masks, 10)
    assert calls == [1]
    optimizer.param_groups[0]["momentum"] = 0.95  # 45 steps: the window is open now
    train(model, optimizer, masks, 11, skip=10)
    assert calls == [1, 12] and model[0].probe is not None
    state = masks.state_dict()
    masks.load_state_dict(state)
    assert calls == [1, 12, 12]


# ---- averaged models -----------------------------------------------------------------------------


def test_an_average_made_anew_at_updates_is_the_average_since_then():
    model = make_model(sizes=(12, 16, 4), density=0.2)
    optimizer = sgd(model)
    made = []

    def on_update(record):
        made.append(AveragedModel(model))

    masks = SparseMomentum(
        model,
        optimizer,
        total_steps=20,
        update_every=4,
        on_update=on_update,
        dense_above=0.25,
        signal="exact",
    )
    on_update(None)
    since = []
    for i in range(20):
        before = len(made)
        train(model, optimizer, masks, i + 1, skip=i)
        since = [] if len(made) > before else since
        made[-1].update_parameters(model)
        since.append(weights(model))
        torch.testing.assert_close(weights(made[-1].module), torch.stack(since).mean(0))
        assert masks.finished == (i + 1 >= 16)
    history = masks.history
    assert any(r.reallocated for r in history) and any(r.storage_changes for r in history)
