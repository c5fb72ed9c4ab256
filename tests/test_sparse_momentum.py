"""SparseMomentum against an independent masked-dense implementation of the official procedure."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from small_training import DTYPE, batches, make_model, sparse, stored, train
from torch import nn

from sparse_kernels.nn.linear import SparseLinear
from sparse_kernels.training import SparseMomentum

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the official procedure, dense weights times masks, plain Python rules -----------------------


class MaskedDense:
    """The official code of arXiv 1907.04840 with exact counts: all is dense but the masks."""

    def __init__(self, model, make_optimizer, total_steps, update_every):
        self.weights, self.biases, self.masks = [], [], []
        for layer in sparse(model):
            self.weights.append(nn.Parameter(layer.dense_matrix().detach().clone()))
            self.biases.append(nn.Parameter(layer.bias.detach().clone()))
            self.masks.append(layer.pattern.mask().clone())
        self.optimizer = make_optimizer([*self.weights, *self.biases])
        self.total, self.every, self.steps = total_steps, update_every, 0

    def __call__(self, x):
        for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = nn.functional.linear(x if i == 0 else torch.tanh(x), w, b)
        return x

    @torch.no_grad()
    def apply(self):
        for w, m in zip(self.weights, self.masks, strict=True):
            w.mul_(m)

    def step(self):
        self.optimizer.step()
        self.apply()
        self.steps += 1
        if self.steps % self.every == 0 and self.steps < self.total:
            self.update()

    def momentum(self, w):
        state = self.optimizer.state[w]
        if "exp_avg" in state:
            return state["exp_avg"] / (torch.sqrt(state["exp_avg_sq"]) + 1e-8)
        return state["momentum_buffer"]

    @torch.no_grad()
    def update(self):
        p = 0.005 + (0.5 - 0.005) * (1 + math.cos(math.pi * self.steps / self.total)) / 2
        momenta = [self.momentum(w) for w in self.weights]
        raw = [float(m.abs()[k].mean()) for m, k in zip(momenta, self.masks, strict=True)]
        shares = [r / sum(raw) for r in raw]
        new_masks, removed, free = [], [], []
        for w, mask, share in zip(self.weights, self.masks, shares, strict=True):
            nnz, total = int(mask.sum()), mask.numel()
            sparsity = Fraction(total - nnz, total)
            tweak = sparsity < Fraction(1, 5) and share > 1 / len(shares)
            count = math.ceil((min(sparsity, p) if tweak else p) * nnz)
            flat = mask.flatten().tolist()
            size = w.abs().flatten().tolist()
            order = sorted((i for i in range(total) if flat[i]), key=lambda i: (size[i], i))
            for i in order[:count]:
                flat[i] = False
            new_masks.append(flat)
            removed.append(count)
            free.append(total - nnz + count)
        growth = self.redistribute(shares, sum(removed), free)
        for i, (flat, k) in enumerate(zip(new_masks, growth, strict=True)):
            score = momenta[i].abs().flatten().tolist()
            order = sorted(
                (j for j in range(len(flat)) if not flat[j]), key=lambda j: (-score[j], j)
            )
            for j in order[:k]:
                flat[j] = True
            self.masks[i] = torch.tensor(flat).view(self.masks[i].shape)
        self.apply()  # once, after growth: pruned and regrown weights keep their value

    @staticmethod
    def redistribute(shares, total, free):
        """The official loop: the mean residual goes to every layer until nothing is left over."""
        regrowth = [s * total for s in shares]
        caps = [math.floor(0.99 * f) for f in free]
        residual = 0.0
        for _ in range(10000):
            regrowth = [r + residual / len(shares) for r in regrowth]
            over = [max(0.0, r - c) for r, c in zip(regrowth, caps, strict=True)]
            regrowth = [r - o for r, o in zip(regrowth, over, strict=True)]
            residual = sum(over)
            if residual < 1e-12:
                break
        counts = [math.floor(r + 1e-9) for r in regrowth]
        order = sorted(range(len(counts)), key=lambda i: (counts[i] - regrowth[i], i))
        for i in order[: total - sum(counts)]:
            counts[i] += 1
        return counts


def train_both(make_optimizer, density=0.3, signal="exact", steps=40, every=4, **options):
    model = make_model(density=density)
    reference = MaskedDense(model, make_optimizer, steps, every)
    optimizer = make_optimizer(model.parameters())
    masks = SparseMomentum(
        model, optimizer, total_steps=steps, update_every=every, signal=signal, **options
    )
    train(model, optimizer, masks, steps)
    for x, y in batches(steps):
        reference.optimizer.zero_grad()
        nn.functional.cross_entropy(reference(x), y).backward()
        reference.step()
    return model, optimizer, masks, reference


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, nesterov=True),
    "foreach nesterov": lambda p: torch.optim.SGD(
        p, lr=0.2, momentum=0.9, nesterov=True, foreach=True
    ),
    "dampening": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.8, dampening=0.3),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("density", [0.15, 0.6, 0.9])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_whole_training_equals_the_official_procedure(name, density):
    model, optimizer, masks, reference = train_both(OPTIMIZERS[name], density)
    assert masks.updates == 9
    moved = 0
    for layer, weight, bias, mask in zip(
        sparse(model), reference.weights, reference.biases, reference.masks, strict=True
    ):
        assert torch.equal(layer.pattern.mask(), mask)
        torch.testing.assert_close(layer.dense_matrix(), weight, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(layer.bias, bias, rtol=1e-9, atol=1e-11)
        for key, tensor in reference.optimizer.state[weight].items():
            if key == "step":
                continue
            own = optimizer.state[layer.values][key]
            dense = own if layer.storage == "dense-masked" else layer.pattern.expand(own)
            torch.testing.assert_close(dense, tensor * mask, rtol=1e-8, atol=1e-11)
            moved += 1
    assert moved > 0


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_storage_changes_alter_nothing(name):
    """At dense_above 0.35 layers go dense and come back; the reference knows no storage."""
    model, _, masks, reference = train_both(OPTIMIZERS[name], 0.35, dense_above=0.35, steps=60)
    seen = {s for record in masks.history for s in record.storage_changes.values()}
    assert "dense-masked" in seen
    for layer, weight in zip(sparse(model), reference.weights, strict=True):
        torch.testing.assert_close(layer.dense_matrix(), weight, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_window_over_the_whole_history_is_exact(name):
    """With a tolerance so small that the window reaches back to step 1, nothing is missing.

    An Adam window starts empty, so its first update is exact too, by the corrected second moment.
    """
    for signal in ("exact", "window"):
        model, _, masks, reference = train_both(
            OPTIMIZERS[name], signal=signal, steps=8, every=4, window_tolerance=1e-6
        )
        assert masks.updates == 1
        for layer, mask in zip(sparse(model), reference.masks, strict=True):
            assert torch.equal(layer.pattern.mask(), mask), signal


def agreement(tolerance, every=50):
    """Share of the grown positions of one update that window and exact choose alike."""
    grown = []
    for signal in ("exact", "window"):
        model = make_model(sizes=(12, 60, 60, 4), density=0.1)
        before = [layer.pattern.mask().clone() for layer in sparse(model)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        masks = SparseMomentum(
            model,
            optimizer,
            total_steps=1000,
            update_every=every,
            signal=signal,
            window_tolerance=tolerance,
        )
        train(model, optimizer, masks, every)
        assert masks.updates == 1
        after = [layer.pattern.mask() for layer in sparse(model)]
        grown.append(torch.cat([(a & ~b).flatten() for a, b in zip(after, before, strict=True)]))
    return float((grown[0] & grown[1]).sum() / grown[0].sum())


def test_window_approaches_exact_as_its_tolerance_falls():
    assert agreement(0.1) > 0.85
    assert agreement(0.001) > 0.99


def test_window_probes_live_in_the_window_only():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    masks = SparseMomentum(
        model, optimizer, total_steps=30, update_every=10, signal="window", window_tolerance=0.1
    )  # 0.5**4 <= 0.1 < 0.5**3
    for step, (x, y) in enumerate(batches(30), start=1):
        expected = step <= 20 and (step - 1) % 10 >= 6
        assert [layer.probe is not None for layer in sparse(model)] == [expected] * 3, step
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert all(layer.probe is None or layer.probe.grad is None for layer in sparse(model))
        masks.step()
        if step % 10 == 0:
            assert all(not s.buffers for s in masks._signals)


@pytest.mark.parametrize("block", [(1, 1), (2, 1), (4, 3), (3, 5)])
@pytest.mark.parametrize("signal", ["exact", "window", "gradient", "random"])
def test_blocks_are_conserved_over_twelve_updates(signal, block):
    model = make_model(block=block, density=0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before, parameters = stored(model), [layer.values for layer in sparse(model)]
    masks = SparseMomentum(model, optimizer, total_steps=39, update_every=3, signal=signal)
    train(model, optimizer, masks, 39)
    assert masks.updates == 12
    assert stored(model) == before
    for record in masks.history:
        assert sum(record.nnz_before.values()) == sum(record.nnz_after.values()) == before
        assert record.removed > 0
    for layer, values in zip(sparse(model), parameters, strict=True):
        assert layer.values is values
        if layer.storage == "compressed":
            layer.pattern.validate()
            assert not layer.values[layer.pattern.nnzb :].any()
            inside = layer.pattern.inside_mask()
            if inside is not None:
                assert not layer.values[: layer.pattern.nnzb][~inside].any()


def test_block_shapes_have_budgets_of_their_own():
    model = nn.Sequential(
        SparseLinear(12, 16, density=0.3, dtype=DTYPE),
        SparseLinear(16, 16, density=0.3, block=(4, 1), dtype=DTYPE),
        SparseLinear(16, 16, density=0.3, block=(4, 1), dtype=DTYPE),
        SparseLinear(16, 4, density=0.3, dtype=DTYPE),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    classes = lambda: (  # noqa: E731
        model[0].pattern.nnzb + model[3].pattern.nnzb,
        model[1].pattern.nnzb + model[2].pattern.nnzb,
    )
    before = classes()
    masks = SparseMomentum(model, optimizer, total_steps=20, update_every=4, signal="exact")
    train(model, optimizer, masks, 20)
    assert classes() == before


@pytest.mark.parametrize("prune", ["magnitude", "set", "global_magnitude"])
@pytest.mark.parametrize("redistribution", ["momentum", "magnitude", "nonzero", "none"])
def test_every_combination_of_named_rules_conserves(prune, redistribution):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = stored(model)
    masks = SparseMomentum(
        model,
        optimizer,
        total_steps=20,
        update_every=4,
        prune=prune,
        redistribution=redistribution,
        growth="random",
        decay="linear",
        signal="exact",
    )
    train(model, optimizer, masks, 20)
    assert stored(model) == before
    if redistribution == "none" and prune == "magnitude":
        assert all(r.nnz_before == r.nnz_after for r in masks.history)


def test_own_rules_are_plain_callables():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def first(layers, counts):
        return [torch.arange(s.nnz) < k for s, k in zip(layers, counts, strict=True)]

    def last_free(candidates, count):
        free = torch.ones(candidates.blocks, dtype=torch.bool)
        free[candidates.kept] = False
        return free.nonzero().reshape(-1)[-count:] if count else torch.empty(0, dtype=torch.int64)

    masks = SparseMomentum(
        model,
        optimizer,
        total_steps=9,
        update_every=4,
        prune=first,
        growth=last_free,
        signal="random",
        redistribution=lambda layers: torch.ones(len(layers)),
        decay=lambda initial, final, progress: 0.25,
    )
    before = model[0].pattern.keys().clone()
    train(model, optimizer, masks, 4)
    after = model[0].pattern.keys()
    assert masks.history[0].prune_rate == 0.25
    lost = math.ceil(0.25 * len(before))
    assert set(before[lost:].tolist()) <= set(after.tolist())
    assert model[0].pattern.block_mask().flatten()[-5:].all()


@pytest.mark.parametrize("result", ["stored", "twice", "few", "far"])
def test_a_wrong_growth_rule_is_refused_and_changes_nothing(result):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def grow(candidates, count):
        free = torch.ones(candidates.blocks, dtype=torch.bool)
        free[candidates.kept] = False
        keys = free.nonzero().reshape(-1)[:count]
        return {
            "stored": torch.cat([candidates.kept[:1], keys[1:]]),
            "twice": torch.cat([keys[1:2], keys[1:]]),
            "few": keys[1:],
            "far": torch.cat([keys[1:], torch.tensor([candidates.blocks])]),
        }[result]

    masks = SparseMomentum(
        model, optimizer, total_steps=9, update_every=1, growth=grow, signal="exact"
    )
    before = [layer.pattern.keys().clone() for layer in sparse(model)]
    with pytest.raises(ValueError, match="layer '0': the growth rule must return int64"):
        train(model, optimizer, masks, 1)
    assert all(torch.equal(a.pattern.keys(), b) for a, b in zip(sparse(model), before, strict=True))


@pytest.mark.parametrize(
    ("density", "before", "after"),
    [
        (0.6, "compressed", "dense-masked"),
        (0.45, "compressed", "compressed"),
        (0.45, "dense-masked", "dense-masked"),  # between 0.8 * 0.5 and 0.5: as it was
        (0.3, "dense-masked", "compressed"),
    ],
)
def test_storage_follows_density_with_hysteresis(density, before, after):
    model = make_model(density=density)
    for layer in sparse(model):
        layer.to_storage_(before)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks = SparseMomentum(
        model,
        optimizer,
        total_steps=9,
        update_every=4,
        redistribution="none",
        dense_above=0.5,
        signal="exact",
    )
    train(model, optimizer, masks, 5)
    assert [layer.storage for layer in sparse(model)] == [after] * 3
    moved = dict.fromkeys(("0", "2", "4"), after) if before != after else {}
    assert masks.history[0].storage_changes == moved
