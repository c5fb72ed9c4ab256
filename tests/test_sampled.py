"""Signal "sampled": what it draws, that it gathers there what "exact" does, what it holds."""

from __future__ import annotations

import math

import pytest
import torch
from small_training import batches, make_model, sparse, stored, train
from torch import nn

from sparse_kernels.nn.conv import SparseConv2d
from sparse_kernels.nn.linear import SparseLinear
from sparse_kernels.pattern import SparsityPattern
from sparse_kernels.training import SparseMomentum, device
from sparse_kernels.training.rules import Candidates, grow_largest
from sparse_kernels.workbench.account import signal_bytes

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "none": lambda p: torch.optim.SGD(p, lr=0.05),
}
LAYERS = {
    "linear": (lambda: SparseLinear(20, 12, density=0.2), (7, 20)),
    "blocks-3d": (lambda: SparseLinear(21, 13, density=0.2, block=(2, 3)), (3, 5, 21)),
    "groups": (lambda: SparseConv2d(6, 8, 3, padding=1, groups=2, density=0.2), (4, 6, 9, 9)),
    "reflect": (
        lambda: SparseConv2d(6, 8, 3, 2, padding=1, padding_mode="reflect", density=0.2),
        (6, 9, 9),
    ),
}


def backward(layer, x):
    """An in-place ReLU follows, as in many nets."""
    layer.values.grad = None
    nn.ReLU(inplace=True)(layer(x)).square().sum().backward()
    return layer.probe.grad, layer.values.grad


@pytest.mark.parametrize("storage", ["compressed", "dense-masked"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_probe_gathers_the_dense_gradient_at_its_blocks(name, storage):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make().to_storage_(storage)
    x = torch.randn(shape)
    layer.make_probe()
    dense, own = backward(layer, x)
    geometry = {"block": layer.block, "row_parts": layer.row_parts, "col_parts": layer.col_parts}
    pattern = SparsityPattern.random(layer.matrix_shape, 0.3, **geometry)
    layer.make_probe(pattern)
    found, again = backward(layer, x)
    torch.testing.assert_close(found, pattern.compress(dense), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again, own, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not layer(x).requires_grad
    with pytest.raises(ValueError, match="matrix, block and parts"):
        layer.make_probe(SparsityPattern.random((3, 4), 0.5))


def driven(optimizer="sgd", signal="sampled", block=(1, 1), **options):
    model = make_model(block=block)
    made = OPTIMIZERS[optimizer](model.parameters())
    options = {"total_steps": 41, "update_every": 10, "window_tolerance": 0.01, **options}
    return model, made, SparseMomentum(model, made, signal=signal, **options)


@pytest.mark.parametrize("block", [(1, 1), (2, 3)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_sample_of_everything_gives_the_masks_of_window(optimizer, block):
    """Updates are nearer than the window is long; "window" goes on over an update, so one only."""
    found = []
    for signal in ("window", "sampled"):
        model, made, masks = driven(optimizer, signal, block, sample_share=1.0, total_steps=20)
        train(model, made, masks, 20)
        assert masks.updates == 1
        found.append(model)
    for a, b in zip(*map(sparse, found), strict=True):
        assert torch.equal(a.pattern.keys(), b.pattern.keys())
        torch.testing.assert_close(a.values, b.values)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_sample_has_the_momentum_of_exact_and_its_largest_grow(optimizer):
    exact = driven(optimizer, "exact")
    drawn = driven(optimizer, "sampled", sample_share=0.3)
    for model, made, masks in (exact, drawn):
        for x, y in batches(9):
            made.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            made.step()
            masks.step()
    for full, part in zip(exact[2]._signals, drawn[2]._signals, strict=True):
        sample = part.places[part.free_at]
        scores = full.complete(full.layer.pattern.keys())
        found = part.complete(part.layer.pattern.keys())
        # 10 steps would be one window; both began at the first step.
        torch.testing.assert_close(found.scores, scores[found.places], rtol=1e-6, atol=1e-9)
        assert 0 < sample.numel() == math.ceil(0.3 * (scores.numel() - part.layer.pattern.nnzb))
        assert not torch.isin(sample, part.layer.pattern.keys()).any()
        kept = part.layer.pattern.keys()
        places = Candidates("x", kept, scores.numel(), found.scores.clone(), None, 0, found.places)
        places.scores.index_fill_(0, torch.searchsorted(found.places, kept), -1.0)
        grown = grow_largest(places, 5)
        assert set(grown.tolist()) == set(sample[scores[sample].topk(5).indices].tolist())
        state = part.grown_state(grown)
        for name in part.view.state_names:
            torch.testing.assert_close(state[name], full.state(name, grown), rtol=1e-6, atol=1e-9)


def test_every_free_place_is_drawn_alike_often():
    """2,000 draws of 1 in 4 free places: each place within five standard deviations of 500."""
    model, _, masks = driven(sample_share=0.25)
    signal = masks._signals[0]
    counts = torch.zeros(192)
    for _ in range(2000):
        signal.disarm()
        masks._arm()
        counts[signal.places[signal.free_at]] += 1
    stored_keys = model[0].pattern.keys()
    assert counts[stored_keys].sum() == 0
    free = torch.ones(192, dtype=torch.bool).index_fill_(0, stored_keys, False)
    share = math.ceil(0.25 * int(free.sum())) / int(free.sum())
    expected, deviation = 2000 * share, (2000 * share * (1 - share)) ** 0.5
    assert (counts[free] - expected).abs().max() < 5 * deviation
    assert counts[free].std() > 0.5 * deviation  # drawn, not dealt in turn


def test_more_growth_than_sample_is_drawn_at_random():
    kept, places = torch.arange(0, 100, 2), torch.cat([torch.arange(0, 100, 2), torch.tensor([7])])
    places = places.sort().values
    scores = torch.where(places == 7, 1.0, -1.0)
    grown = []
    for seed in (0, 0, 1):
        generator = torch.Generator().manual_seed(seed)
        grown.append(grow_largest(Candidates("x", kept, 100, scores, generator, 0, places), 9))
    assert torch.equal(grown[0], grown[1]) and not torch.equal(grown[0], grown[2])
    for keys in grown:
        assert 7 in keys and keys.unique().numel() == 9 and not torch.isin(keys, kept).any()


@pytest.mark.parametrize("block", [(1, 1), (2, 3)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_trained_twice_and_with_a_stop_in_the_window_it_is_the_same(optimizer, block):
    results = []
    for stop in (None, None, 26, 21, 10):
        model, made, masks = driven(optimizer, block=block, sample_share=0.2, window_tolerance=0.5)
        before = stored(model)
        train(model, made, masks, stop or 41)
        if stop is not None:
            states = (model.state_dict(), made.state_dict(), masks.state_dict())
            model, made, masks = driven(
                optimizer, block=block, sample_share=0.2, window_tolerance=0.5
            )
            for part, state in zip((model, made, masks), states, strict=True):
                part.load_state_dict(state)
            train(model, made, masks, 41, skip=stop)
        assert stored(model) == before and masks.updates == 4
        results.append(torch.cat([layer.dense_matrix().flatten() for layer in sparse(model)]))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_masks_are_those_of_a_queued_device(monkeypatch):
    results = []
    for queued in (False, True):
        monkeypatch.setattr(device, "queued", lambda tensor, queued=queued: queued)
        model, made, masks = driven(sample_share=0.2)
        train(model, made, masks, 41)
        results.append(torch.cat([layer.dense_matrix().flatten() for layer in sparse(model)]))
    assert torch.equal(*results)


def test_clipping_and_scale_are_found_by_the_witnesses():
    model, made, masks = driven(sample_share=0.5)
    twin, twin_made, twin_masks = driven("sgd", "exact")
    for x, y in batches(9):
        for net, optimizer, driver in ((model, made, masks), (twin, twin_made, twin_masks)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.01)
            optimizer.step()
            driver.step()
    for part, full in zip(masks._signals, twin_masks._signals, strict=True):
        found = part.complete(part.layer.pattern.keys())
        whole = full.complete(full.layer.pattern.keys())
        torch.testing.assert_close(found.scores, whole[found.places], rtol=1e-5, atol=1e-9)
    for layer in sparse(model):
        layer.values.register_hook(lambda grad: grad * torch.randn_like(grad))
    made.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="not a multiple"):
        made.step()


def test_it_holds_a_share_of_what_exact_holds_and_nothing_outside_of_its_window():
    peaks = {}
    for signal in ("exact", "sampled"):
        model = nn.Sequential(SparseLinear(400, 300, density=0.05), nn.ReLU(), nn.Linear(300, 4))
        made = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        masks = SparseMomentum(
            model, made, total_steps=61, update_every=30, signal=signal, sample_share=0.05,
            window_tolerance=0.35,
        )  # fmt: skip
        sizes = []
        for _ in range(30):
            made.zero_grad()
            model(torch.randn(8, 400)).square().mean().backward()
            sizes.append(signal_bytes(masks))
            made.step()
            masks.step()
        peaks[signal] = max(sizes)
        if signal == "sampled":
            assert sizes[:20] == [0] * 20 and sizes[-1] > 0 and signal_bytes(masks) == 0
            assert model[0].probe is None and model[0].probe_pattern is None
    assert peaks["exact"] >= 2 * 4 * 400 * 300  # gradient and momentum
    assert peaks["sampled"] < peaks["exact"] / 4


def test_refusals():
    for growth in ("neuron", "fan_in", "groups:4"):
        with pytest.raises(ValueError, match="knows a sample"):
            driven(growth=growth)
    with pytest.raises(ValueError, match="sample_share must be in"):
        driven(sample_share=0.0)
    model, made, masks = driven()
    train(model, made, masks, 3)
    state = masks.state_dict()
    state["signals"]["0"]["places"] = state["signals"]["0"]["places"].flip(0)
    with pytest.raises(ValueError, match="ascending int64"):
        masks.load_state_dict(state)
    window = driven(signal="window")
    train(*window, 3)
    with pytest.raises(ValueError, match="this signal is another"):
        masks.load_state_dict(window[2].state_dict())


def test_a_rule_of_ones_own_sees_a_score_for_every_block():
    seen = []

    def own(places: Candidates, count: int) -> torch.Tensor:
        assert places.places is None and places.scores.shape == (places.blocks,)
        assert (places.scores[places.kept] == -1).all()
        seen.append(int((places.scores > 0).sum()))
        return grow_largest(places, count)

    model, made, masks = driven(growth=own)
    train(model, made, masks, 41)
    assert len(seen) == 12 and min(seen) > 0


def test_moved_to_another_dtype_the_probe_follows():
    model, _, masks = driven()
    model.float()
    probe = model[0].probe
    assert probe.dtype == torch.float32 and probe.shape[0] == model[0].probe_pattern.capacity
    assert masks._signals[0].places.numel() == probe.shape[0]
