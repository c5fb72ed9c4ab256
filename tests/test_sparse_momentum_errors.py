"""What SparseMomentum refuses, and what it notices while it trains."""

from __future__ import annotations

import pytest
import torch
from small_training import batches, make_model, sparse, train
from torch import nn

from sparse_kernels.nn.linear import SparseLinear
from sparse_kernels.training import SparseMomentum

pytestmark = pytest.mark.usefixtures("one_thread")


def test_errors_at_construction():
    model = make_model()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    steps = {"total_steps": 10, "update_every": 2}
    dense = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="no sparse layer; call sparsify"):
        SparseMomentum(dense, torch.optim.SGD(dense.parameters(), lr=0.1), **steps)
    with pytest.raises(ValueError, match=r"build it from model.parameters.. after sparsify"):
        SparseMomentum(model, torch.optim.SGD(dense.parameters(), lr=0.1), **steps)
    with pytest.raises(TypeError, match=r"torch.optim.Optimizer, got int"):
        SparseMomentum(model, 3, **steps)
    with pytest.raises(TypeError):
        SparseMomentum(model, sgd, 10, 2, signal="exact")
    for bad in (0, -1, 2.5, True, None):
        with pytest.raises(ValueError, match="total_steps must be an integer >= 1"):
            SparseMomentum(model, sgd, total_steps=bad, update_every=1, signal="exact")
        with pytest.raises(ValueError, match="update_every must be an integer >= 1"):
            SparseMomentum(model, sgd, total_steps=5, update_every=bad, signal="exact")
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
        SparseMomentum(
            model, cls(model.parameters(), lr=0.1), total_steps=9, update_every=3, signal="exact"
        )


def test_shared_values_are_refused():
    model = nn.Sequential(SparseLinear(8, 8), SparseLinear(8, 8))
    model[1].values = model[0].values
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="layers '0' and '1' share one `values`"):
        SparseMomentum(model, optimizer, total_steps=9, update_every=3, signal="exact")


@pytest.mark.parametrize("where", ["weight", "momentum", "growth signal"])
def test_non_finite_numbers_raise_at_the_update_and_keep_the_mask(where):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks = SparseMomentum(model, optimizer, total_steps=20, update_every=4, signal="exact")
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
    masks = SparseMomentum(model, optimizer, total_steps=500, update_every=3, signal="exact")
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
    masks = SparseMomentum(model, optimizer, total_steps=9, update_every=3, signal="exact")
    assert model[0].probe is not None
    masks.close()
    assert model[0].probe is None and not optimizer._optimizer_step_pre_hooks


def test_grad_scaler_and_its_skipped_steps():
    """One overflow in mid-training: the same weights as without scaler and without that batch."""
    results = []
    for scaled in (False, True):
        model = make_model(dtype=torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        masks = SparseMomentum(model, optimizer, total_steps=20, update_every=4, signal="exact")
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**12)
        for i, (x, y) in enumerate(batches(20, dtype=torch.float32)):
            if i == 6 and scaled:
                optimizer.zero_grad()
                scaler.scale(model(x).sum() * float("inf")).backward()
                scaler.step(optimizer)
                scaler.update()
                assert masks.step() is None
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
            masks.step()
        assert masks.steps == 20 and masks.updates == 4
        results.append([layer.dense_matrix() for layer in sparse(model)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
