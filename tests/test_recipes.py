"""What people add to a training (clipping, micro-batches, weight decay, a schedule, an EMA), over
mask updates, against dense weights times masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_training import batches, make_model, sparse
from test_sparse_momentum import MaskedDense
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparse_kernels.training import SparseMomentum, follow

STEPS, EVERY, DECAY, CLIP = 30, 4, 0.8, 0.05


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.2),
}


class DenseRecipe(MaskedDense):
    """Dense weights times masks, clipped by the norm of what a sparse net has, and their EMA."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.average = [w.detach().clone() for w in self.weights]

    def clip(self) -> float:
        seen = [w.grad * m for w, m in zip(self.weights, self.masks, strict=True)]
        norm = torch.stack([g.square().sum() for g in (*seen, *(b.grad for b in self.biases))])
        factor = min(1.0, CLIP / (float(norm.sum().sqrt()) + 1e-6))
        for p in (*self.weights, *self.biases):
            p.grad *= factor
        return factor

    def step(self) -> None:
        super().step()
        for a, w, m in zip(self.average, self.weights, self.masks, strict=True):
            a.mul_(m).mul_(DECAY).add_(w.detach(), alpha=1 - DECAY)


def gradients(net: Any, x: Tensor, y: Tensor, parts: int) -> None:
    for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
        (nn.functional.cross_entropy(net(xs), ys) / parts).backward()


@pytest.mark.parametrize("dense_above", [1.0, 0.25])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_whole_recipe_acts_as_on_dense_weights(name: str, dense_above: float) -> None:
    """All at once, since each may disturb what the others and the growth signal see."""
    model = make_model(density=0.2)
    dense = DenseRecipe(model, OPTIMIZERS[name], STEPS, EVERY)
    optimizer = OPTIMIZERS[name](model.parameters())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    average.n_averaged += 1  # the first update would copy the weights
    masks = SparseMomentum(
        model, optimizer, total_steps=STEPS, update_every=EVERY, dense_above=dense_above,
        on_update=lambda record: follow(average, model),
        signal="exact",
    )  # fmt: skip
    both = (optimizer, dense.optimizer)
    schedules = [OneCycleLR(made, max_lr=0.1, total_steps=STEPS + 1) for made in both]
    factors = []
    for x, y in batches(STEPS):
        optimizer.zero_grad()
        gradients(model, x, y, 4)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        masks.step()
        average.update_parameters(model)
        dense.optimizer.zero_grad()
        gradients(dense, x, y, 1)
        factors.append(dense.clip())
        dense.step()
        for schedule in schedules:
            schedule.step()
    assert masks.updates == 7 and any(f < 0.9 for f in factors)
    assert any(r.reallocated for r in masks.history)
    assert any(r.storage_changes for r in masks.history) == (dense_above < 1)
    averaged = sparse(average)
    for i, layer in enumerate(sparse(model)):
        assert torch.equal(layer.pattern.mask(), dense.masks[i])
        torch.testing.assert_close(layer.dense_matrix(), dense.weights[i], rtol=1e-7, atol=1e-9)
        assert torch.equal(averaged[i].pattern.keys(), layer.pattern.keys())
        assert averaged[i].storage == layer.storage
        torch.testing.assert_close(
            averaged[i].dense_matrix(), dense.average[i], rtol=1e-7, atol=1e-9
        )
    assert not torch.equal(averaged[0].dense_matrix(), sparse(model)[0].dense_matrix())
    x = next(batches(1))[0]
    assert average(x).shape == (20, 4)  # its kernels read the moved pattern


def test_an_average_that_cannot_follow_is_refused_and_left_alone() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="use_buffers=True, which averages the indices"):
        follow(AveragedModel(model, use_buffers=True), model)
    with pytest.raises(ValueError, match="has 2 sparse layers, the model 3"):
        follow(make_model(sizes=(12, 16, 4)), model)
    other = make_model(block=(2, 1), seed=3)
    keys = [layer.pattern.keys().clone() for layer in sparse(other)]
    with pytest.raises(ValueError, match=r"layer '0' is \(16, 12\) in blocks \(1, 1\)"):
        follow(other, model)
    assert all(map(torch.equal, keys, (layer.pattern.keys() for layer in sparse(other))))


def test_equal_patterns_stay_where_they_are() -> None:
    model = make_model()
    average = AveragedModel(model)
    pointers = [layer.values.data_ptr() for layer in sparse(average)]
    before = [layer.dense_matrix().clone() for layer in sparse(average)]
    follow(average, model)
    assert pointers == [layer.values.data_ptr() for layer in sparse(average)]
    assert all(map(torch.equal, before, (s.dense_matrix() for s in sparse(average))))
