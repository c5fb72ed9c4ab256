"""SparseMomentum against an independent masked-dense implementation of the official procedure."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from sparse_kernels.nn.base import SparseLayer
from sparse_kernels.nn.linear import SparseLinear
from sparse_kernels.training import SparseMomentum

DTYPE = torch.float64


def make_model(sizes=(12, 16, 10, 4), density=0.3, seed=0, dtype=DTYPE, block=(1, 1)) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for rows_in, rows_out in zip(sizes[:-1], sizes[1:], strict=True):
        layers.append(
            SparseLinear(
                rows_in, rows_out, density=density, block=block, generator=generator, dtype=dtype
            )
        )
        layers.append(nn.Tanh())
    return nn.Sequential(*layers[:-1])


def batches(count: int, features=12, classes=4, dtype=DTYPE):
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        x = torch.randn(20, features, generator=generator, dtype=dtype)
        # Unequal input scales keep the momenta of the layers from being alike.
        yield x * torch.linspace(0.2, 2, features, dtype=dtype), torch.randint(
            classes, (20,), generator=generator
        )


def train(model, optimizer, masks, count, skip=0) -> float:
    loss = torch.zeros(())
    for i, (x, y) in enumerate(batches(count)):
        if i < skip:
            continue
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        masks.step()
    return float(loss.detach())


def sparse(model) -> list[SparseLayer]:
    return [m for m in model.modules() if isinstance(m, SparseLayer)]


def stored(model) -> int:
    return sum(m.pattern.nnzb for m in sparse(model))


# ---- the official procedure, dense weights times masks, plain Python rules -----------------------


class MaskedDense:
    """The official code of arXiv 1907.04840 with exact counts: dense weights, gradients, momentum."""

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
            sparsity = (total - nnz) / total
            tweak = sparsity < 0.2 and share > 1 / len(shares)
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
            order = sorted((j for j in range(len(flat)) if not flat[j]), key=lambda j: (-score[j], j))
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
def test_storage_moves_both_ways_and_changes_nothing(name):
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
    masks = SparseMomentum(model, optimizer, total_steps=20, update_every=4)
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

    masks = SparseMomentum(model, optimizer, total_steps=9, update_every=1, growth=grow)
    before = [layer.pattern.keys().clone() for layer in sparse(model)]
    with pytest.raises(ValueError, match="layer '0': the growth rule must return int64"):
        train(model, optimizer, masks, 1)
    assert all(torch.equal(a.pattern.keys(), b) for a, b in zip(sparse(model), before, strict=True))


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
    masks = SparseMomentum(model, optimizer, total_steps=9, update_every=1, growth="gradient")
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
        masks = SparseMomentum(model, optimizer, total_steps=20, update_every=4)
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
        masks = SparseMomentum(model, optimizer, total_steps=20, update_every=4)
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
    masks = SparseMomentum(model, optimizer, total_steps=20, update_every=2)
    x, y = next(iter(batches(1)))
    (float("inf") * nn.functional.cross_entropy(model(x), y)).backward()
    assert masks.step() is None and masks.steps == 0  # the optimizer did not step
    assert model[0].probe.grad is None and not masks._signals[0].buffers
    optimizer.zero_grad()
    train(model, optimizer, masks, 4)
    assert masks.steps == 4 and masks.updates == 2


def test_gradient_that_is_no_multiple_is_refused():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    SparseMomentum(model, optimizer, total_steps=20, update_every=2)
    x, y = next(iter(batches(1)))
    nn.functional.cross_entropy(model(x), y).backward()
    nn.utils.clip_grad_value_(model.parameters(), 1e-6)
    with pytest.raises(RuntimeError, match="layer '0': values.grad is not a multiple"):
        optimizer.step()


# ---- edges -------------------------------------------------------------------------------------


def test_empty_and_full_layers_and_no_momentum_at_all():
    model = make_model()
    empty, full = sparse(model)[0], sparse(model)[2]
    from sparse_kernels.training import rewrite

    rewrite(empty, None, torch.empty(0, dtype=torch.int64))
    rewrite(full, None, torch.arange(full.pattern.numel))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = stored(model)
    masks = SparseMomentum(model, optimizer, total_steps=9, update_every=2, dense_above=1.0)
    for _ in range(9):  # no loss: every momentum is zero
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        masks.step()
    assert masks.updates == 4 and stored(model) == before
    assert all(bool(layer.values.isfinite().all()) for layer in sparse(model))


def test_no_gradient_ever_is_no_crash():
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters())
    before = stored(model)
    masks = SparseMomentum(model, optimizer, total_steps=4, update_every=1)
    for _ in range(4):
        optimizer.step()
        masks.step()
    assert stored(model) == before and masks.updates == 3


def test_pointers_stay_while_the_capacity_suffices():
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    masks = SparseMomentum(
        model, optimizer, total_steps=20, update_every=2, redistribution="none", dense_above=1.0
    )
    train(model, optimizer, masks, 2)

    def pointers():
        return [
            t.data_ptr()
            for layer in sparse(model)
            for t in (layer.values, *layer.pattern.tensors(), *optimizer.state[layer.values].values())
        ]

    before = pointers()
    train(model, optimizer, masks, 20, skip=2)
    assert masks.updates == 9 and pointers() == before
    assert all(not record.reallocated for record in masks.history)


def test_backward_works_after_growth_while_an_old_loss_is_held():
    model = make_model(sizes=(12, 16, 4), density=0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks = SparseMomentum(model, optimizer, total_steps=20, update_every=2)
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


# ---- errors ------------------------------------------------------------------------------------


def test_errors_at_construction():
    model = make_model()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    steps = {"total_steps": 10, "update_every": 2}
    dense = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="no sparse layer; call sparsify"):
        SparseMomentum(dense, torch.optim.SGD(dense.parameters(), lr=0.1), **steps)
    with pytest.raises(ValueError, match="Build the optimizer from model.parameters.. after"):
        SparseMomentum(model, torch.optim.SGD(dense.parameters(), lr=0.1), **steps)
    with pytest.raises(TypeError, match="torch.optim.Optimizer, got int"):
        SparseMomentum(model, 3, **steps)
    with pytest.raises(TypeError):
        SparseMomentum(model, sgd, 10, 2)
    for bad in (0, -1, 2.5, True, None):
        with pytest.raises(ValueError, match="total_steps must be an integer >= 1"):
            SparseMomentum(model, sgd, total_steps=bad, update_every=1)
        with pytest.raises(ValueError, match="update_every must be an integer >= 1"):
            SparseMomentum(model, sgd, total_steps=5, update_every=bad)
    for name, value in (
        ("prune_rate", 1.5),
        ("final_prune_rate", -0.1),
        ("dense_above", float("nan")),
        ("window_tolerance", 1.0),
        ("decay", "step"),
        ("prune", "largest"),
        ("growth", "slow"),
        ("redistribution", None),
        ("signal", "loud"),
    ):
        with pytest.raises(ValueError, match=name):
            SparseMomentum(model, sgd, **steps, **{name: value})
    assert all(layer.probe is None for layer in sparse(model))


@pytest.mark.parametrize("name", ["Muon", "Adafactor", "LBFGS", "Shampoo", "SOAP"])
def test_shape_dependent_optimizers_are_refused_by_name(name):
    model = make_model()
    cls = type(name, (torch.optim.SGD,), {})
    with pytest.raises(TypeError, match=f"{name} cannot train sparse values"):
        SparseMomentum(model, cls(model.parameters(), lr=0.1), total_steps=9, update_every=3)


def test_shared_values_are_refused():
    model = nn.Sequential(SparseLinear(8, 8), SparseLinear(8, 8))
    model[1].values = model[0].values
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="layers '0' and '1' share one `values`"):
        SparseMomentum(model, optimizer, total_steps=9, update_every=3)


@pytest.mark.parametrize("where", ["weight", "momentum", "growth signal"])
def test_non_finite_numbers_raise_at_the_update_and_keep_the_mask(where):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks = SparseMomentum(model, optimizer, total_steps=20, update_every=4)
    train(model, optimizer, masks, 3)
    before = [layer.pattern.keys().clone() for layer in sparse(model)]
    layer = sparse(model)[1]
    with torch.no_grad():
        if where == "weight":
            layer.values[0] = float("nan")
        elif where == "momentum":
            optimizer.state[layer.values]["momentum_buffer"][0] = float("inf")
        else:
            masks._signals[1].buffers["momentum_buffer"].fill_(float("nan"))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    match = "layer '2': non-finite .*" + ("" if where == "momentum" else where)
    optimizer._optimizer_step_pre_hooks.clear()
    masks._stepped = True
    with pytest.raises(FloatingPointError, match=match + ".* after step 4"):
        masks.step()
    for kept, old in zip(sparse(model), before, strict=True):
        assert torch.equal(kept.pattern.keys(), old)


def test_an_optimizer_that_never_steps_is_noticed():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = SparseMomentum(model, optimizer, total_steps=500, update_every=3)
    with pytest.raises(RuntimeError, match="without a step of its optimizer"):
        for _ in range(200):
            masks.step()


def test_checkpoint_of_another_model_is_refused():
    model, other = make_model(), make_model(sizes=(12, 16, 4))
    options = {"total_steps": 9, "update_every": 3}
    masks = SparseMomentum(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)
    others = SparseMomentum(other, torch.optim.SGD(other.parameters(), lr=0.1), **options)
    with pytest.raises(ValueError, match="checkpoint has the sparse layers"):
        masks.load_state_dict(others.state_dict())


def test_close_takes_everything_off():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks = SparseMomentum(model, optimizer, total_steps=9, update_every=3)
    assert model[0].probe is not None
    masks.close()
    assert model[0].probe is None and not optimizer._optimizer_step_pre_hooks
