"""Learning-rate schedulers over mask updates, against dense weights times masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_training import batches, make_model, sparse
from test_sparse_momentum import MaskedDense
from torch import nn
from torch.optim import lr_scheduler

from sparse_kernels.training import SparseMomentum

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 6, gamma=0.3),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 30),
    # This one moves the momentum too, which the growth signal must follow.
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.3, total_steps=31),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_acts_as_on_dense_weights(name) -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.2, momentum=0.9, weight_decay=1e-2)

    model = make_model()
    dense = MaskedDense(model, make, 30, 4)
    optimizer = make(model.parameters())
    masks = SparseMomentum(model, optimizer, total_steps=30, update_every=4, signal="exact")
    schedules = [SCHEDULERS[name](o) for o in (optimizer, dense.optimizer)]
    for x, y in batches(30):
        for net, stepper, owner, schedule in (
            (model, optimizer, masks, schedules[0]),
            (dense, None, dense, schedules[1]),
        ):
            (stepper or dense.optimizer).zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            if stepper is not None:
                stepper.step()
            owner.step()
            schedule.step()
    assert masks.updates == 7 and optimizer.param_groups[0]["lr"] != 0.2
    for layer, weight, mask in zip(sparse(model), dense.weights, dense.masks, strict=True):
        assert torch.equal(layer.pattern.mask(), mask)
        torch.testing.assert_close(layer.dense_matrix(), weight, rtol=1e-8, atol=1e-10)
