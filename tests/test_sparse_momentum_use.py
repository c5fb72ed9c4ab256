"""SparseMomentum in use: optimizers, clipping, skipped steps, edges, resume."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from small_training import batches, make_model, sparse, stored, train
from torch import nn

from sparse_kernels.training import SparseMomentum, rewrite

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- optimizers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
        lambda p: torch.optim.Adagrad(p, lr=0.01),
        lambda p: torch.optim.NAdam(p, lr=0.01),
        lambda p: torch.optim.RAdam(p, lr=0.01),
        lambda p: torch.optim.Adamax(p, lr=0.01),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, maximize=True),
    ],
)
@pytest.mark.parametrize("signal", ["exact", "window"])
def test_elementwise_optimizers_train_on(make, signal):
    model = make_model()
    optimizer = make(model.parameters())
    before = stored(model)
    masks = SparseMomentum(model, optimizer, total_steps=31, update_every=3, signal=signal)
    loss = train(model, optimizer, masks, 31)
    assert math.isfinite(loss) and stored(model) == before and masks.updates == 10


def test_without_momentum_exact_is_the_gradient():
    results = []
    for signal in ("exact", "window", "gradient"):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        masks = SparseMomentum(model, optimizer, total_steps=30, update_every=4, signal=signal)
        assert model[0].probe is None  # one dense gradient per update is enough
        train(model, optimizer, masks, 30)
        results.append(torch.cat([layer.dense_matrix().flatten() for layer in sparse(model)]))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_gradient_growth_picks_the_largest_gradient_and_starts_momentum_at_zero():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks = SparseMomentum(
        model, optimizer, total_steps=9, update_every=1, growth="gradient", signal="exact"
    )
    old = model[0].pattern.mask().clone()
    x, y = next(iter(batches(1)))
    nn.functional.cross_entropy(model(x), y).backward()
    gradient = model[0].probe.grad.abs().clone()
    optimizer.step()
    masks.step()
    new = model[0].pattern.mask()
    added = new & ~old
    free = ~new & ~old
    assert added.any() and gradient[added].min() >= gradient[free].max()
    buffer = model[0].pattern.expand(optimizer.state[model[0].values]["momentum_buffer"])
    assert not buffer[added].any() and buffer[new & old].any()


def test_groups_with_different_momentum_have_different_windows():
    model = make_model()
    optimizer = torch.optim.SGD(
        [
            {"params": model[0].parameters(), "momentum": 0.5},
            {"params": [*model[2].parameters(), *model[4].parameters()], "momentum": 0.9},
        ],
        lr=0.1,
    )
    masks = SparseMomentum(model, optimizer, total_steps=100, update_every=50, signal="window")
    assert [s.length() for s in masks._signals] == [4, 22, 22]


def test_exact_follows_clipping_micro_batches_and_loss_scale():
    """Scaled loss, unscaled and clipped before the step: same masks as the plain gradients give."""
    results = []
    for scale in (1.0, 1024.0):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        masks = SparseMomentum(model, optimizer, total_steps=20, update_every=4, signal="exact")
        for x, y in batches(20):
            optimizer.zero_grad()
            parts = ((x[:10], y[:10]), (x[10:], y[10:])) if scale > 1 else ((x, y),)
            for xs, ys in parts:
                (scale / len(parts) * nn.functional.cross_entropy(model(xs), ys)).backward()
            for p in model.parameters():
                p.grad /= scale
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            masks.step()
        results.append([layer.dense_matrix() for layer in sparse(model)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_a_closure_gives_the_same_training():
    results = []
    for closure in (False, True):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        masks = SparseMomentum(model, optimizer, total_steps=20, update_every=4, signal="exact")
        for x, y in batches(20):

            def loss(model=model, optimizer=optimizer, x=x, y=y):
                optimizer.zero_grad()
                value = nn.functional.cross_entropy(model(x), y)
                value.backward()
                return value

            if closure:
                optimizer.step(loss)
            else:
                loss()
                optimizer.step()
            masks.step()
        results.append([layer.dense_matrix() for layer in sparse(model)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_skipped_steps_count_for_nothing():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks = SparseMomentum(model, optimizer, total_steps=20, update_every=2, signal="exact")
    x, y = next(iter(batches(1)))
    (float("inf") * nn.functional.cross_entropy(model(x), y)).backward()
    assert masks.step() is None and masks.steps == 0  # the optimizer did not step
    assert model[0].probe.grad is None and not masks._signals[0].buffers
    optimizer.zero_grad()
    train(model, optimizer, masks, 4)
    assert masks.steps == 4 and masks.updates == 2


@pytest.mark.parametrize("signal", ["exact", "window", "sampled", "gradient"])
def test_a_skipped_step_before_an_update_leaves_no_trace(signal):
    """The one dense gradient of "gradient" is that of the step which the optimizer took."""
    ends = []
    for skips in (False, True):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        masks = SparseMomentum(
            model, optimizer, total_steps=20, update_every=2, signal=signal,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        for number, (x, y) in enumerate(batches(4)):
            if skips and number == 1:
                (float("inf") * nn.functional.cross_entropy(model(-x), y)).backward()
                assert masks.step() is None and masks.steps == 1  # as a GradScaler that overflowed
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            masks.step()
        assert masks.updates == 2
        ends.append([layer.dense_matrix().detach() for layer in sparse(model)])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_gradient_that_is_no_multiple_is_refused():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks = SparseMomentum(model, optimizer, total_steps=20, update_every=2, signal="exact")
    x, y = next(iter(batches(1)))
    nn.functional.cross_entropy(model(x), y).backward()
    nn.utils.clip_grad_value_(model.parameters(), 1e-6)
    with pytest.raises(RuntimeError, match=r"layer '\d': values.grad is not a multiple"):
        optimizer.step()
    assert masks.steps == 0


# ---- edges -------------------------------------------------------------------------------------


def test_empty_and_full_layers_and_no_momentum_at_all():
    model = make_model()
    empty, full = sparse(model)[0], sparse(model)[2]
    rewrite(empty, None, torch.empty(0, dtype=torch.int64))
    rewrite(full, None, torch.arange(full.pattern.numel))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = stored(model)
    masks = SparseMomentum(
        model, optimizer, total_steps=9, update_every=2, dense_above=1.0, signal="exact"
    )
    with pytest.warns(RuntimeWarning, match="no gradient reached") as warned:
        for _ in range(9):  # no loss: every momentum is zero
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
            masks.step()
    assert len(warned) == 1
    assert masks.updates == 4 and stored(model) == before
    assert all(bool(layer.values.isfinite().all()) for layer in sparse(model))


def test_no_gradient_ever_is_no_crash():
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters())
    before = stored(model)
    masks = SparseMomentum(model, optimizer, total_steps=4, update_every=1, signal="exact")
    message = "after step 1: no gradient reached the growth signal of '0', '2', '4'"
    with pytest.warns(RuntimeWarning, match=message):
        for _ in range(4):
            optimizer.step()
            masks.step()
    assert stored(model) == before and masks.updates == 3


def test_pointers_stay_while_the_capacity_suffices():
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    masks = SparseMomentum(
        model,
        optimizer,
        total_steps=20,
        update_every=2,
        redistribution="none",
        dense_above=1.0,
        signal="exact",
    )
    train(model, optimizer, masks, 2)

    def pointers():
        return [
            t.data_ptr()
            for layer in sparse(model)
            for t in (
                layer.values,
                *layer.pattern.tensors(),
                *optimizer.state[layer.values].values(),
            )
        ]

    before = pointers()
    train(model, optimizer, masks, 20, skip=2)
    assert masks.updates == 9 and pointers() == before
    assert all(not record.reallocated for record in masks.history)


def test_backward_works_after_growth_while_an_old_loss_is_held():
    model = make_model(sizes=(12, 16, 4), density=0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks = SparseMomentum(model, optimizer, total_steps=20, update_every=2, signal="exact")
    held = []
    for x, y in batches(20):
        optimizer.zero_grad()
        held.append(nn.functional.cross_entropy(model(x), y))
        held[-1].backward()
        optimizer.step()
        masks.step()
    assert any(record.reallocated for record in masks.history)


def test_resume_is_bitwise():
    def build():
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, optimizer

    options = {"total_steps": 40, "update_every": 7}
    for growth, signal in (("momentum", "exact"), ("momentum", "window"), ("random", "random")):
        model, optimizer = build()
        masks = SparseMomentum(model, optimizer, growth=growth, signal=signal, **options)
        train(model, optimizer, masks, 18)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), masks.state_dict()))
        train(model, optimizer, masks, 40, skip=18)
        other, other_optimizer = build()
        other.load_state_dict(saved[0])
        other_optimizer.load_state_dict(saved[1])
        again = SparseMomentum(other, other_optimizer, growth=growth, signal=signal, **options)
        again.load_state_dict(saved[2])
        train(other, other_optimizer, again, 40, skip=18)
        for a, b in zip(sparse(model), sparse(other), strict=True):
            assert torch.equal(a.dense_matrix(), b.dense_matrix())
        strip = [(r.step, r.prune_rate, r.removed, r.nnz_after) for r in masks.history]
        assert strip == [(r.step, r.prune_rate, r.removed, r.nnz_after) for r in again.history]
