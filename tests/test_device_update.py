"""The mask update of queued devices is equal to the CPU's, to the last bit.

Run here on CPU tensors: ``device.queued`` is told that reading waits.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from device_support import everything, queue, single_thread, step, trained

from sparse_kernels.training import device, selection
from sparse_kernels.training.layers import sparse_layers


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield from single_thread()


# ---- selection ---------------------------------------------------------------------------------


@pytest.mark.parametrize("trial", range(40))
def test_selection_equals_that_of_the_cpu(trial) -> None:
    draw = torch.Generator().manual_seed(trial)
    n = int(torch.randint(2, 300, (), generator=draw))
    count = int(torch.randint(1, n, (), generator=draw))
    scores = torch.rand(n, generator=draw)
    if trial % 2:
        scores = (scores * 4).round()
    if trial % 3 == 0:
        scores[torch.rand(n, generator=draw) < 0.3] = -1.0
    lowest = device.smallest(scores, count)
    assert torch.equal(lowest, selection.select_smallest(scores, count))
    highest = device.largest(scores, count)
    assert torch.equal(highest, selection.largest_indices(scores, count))
    assert torch.equal(device.positions(lowest, count), lowest.nonzero().flatten())


def test_selection_of_none_and_all_and_of_nothing(monkeypatch) -> None:
    queue(monkeypatch)
    for n, count in ((5, 0), (5, 5), (0, 0)):
        scores = torch.rand(n)
        assert int(selection.select_smallest(scores, count).sum()) == count
        assert selection.largest_indices(scores, count).tolist() == list(range(count))
    assert device.positions(torch.zeros(0, dtype=torch.bool), 0).numel() == 0
    assert device.positions(torch.zeros(4, dtype=torch.bool), 0).numel() == 0


# ---- whole updates -----------------------------------------------------------------------------

CASES = [
    ("sgd", (1, 1), {}),
    ("sgd", (4, 4), {}),
    ("sgd", (2, 3), {"signal": "window", "window_tolerance": 0.75}),
    ("adam", (1, 1), {"signal": "window", "window_tolerance": 0.5}),
    ("adam", (3, 2), {}),
    ("plain", (1, 1), {"signal": "gradient"}),
    ("sgd", (2, 1), {"signal": "random"}),
    ("sgd", (1, 1), {"prune": "global_magnitude", "redistribution": "nonzero"}),
    ("sgd", (2, 2), {"prune": "set", "redistribution": "magnitude"}),
    ("sgd", (1, 1), {"redistribution": "none", "decay": "linear"}),
    ("sgd", (2, 2), {"dense_above": 0.32}),  # layers go to dense-masked and come back
    ("adam", (1, 1), {"dense_above": 0.32}),
    ("sgd", (2, 2), {"dense_above": 0.05}),  # all are dense-masked
]


@pytest.mark.parametrize(("name", "block", "options"), CASES)
def test_training_equals_that_of_the_cpu_to_the_last_bit(monkeypatch, name, block, options) -> None:
    expected, optimizer, masks = trained(name, block, **options)
    wanted = everything(expected, optimizer)
    queue(monkeypatch)
    model, other, driver = trained(name, block, **options)
    assert driver.updates == masks.updates == 4
    found = everything(model, other)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key
    for mine, theirs in zip(driver.history, masks.history, strict=True):
        for field in ("removed", "nnz_before", "nnz_after", "storage_changes", "reallocated"):
            assert getattr(mine, field) == getattr(theirs, field), field
        assert mine.density_after == theirs.density_after
    for _, layer in sparse_layers(model):
        layer.pattern.validate()


@pytest.mark.parametrize("what", ["weight", "momentum", "growth signal"])
def test_non_finite_numbers_are_named_as_on_the_cpu(monkeypatch, what) -> None:
    queue(monkeypatch)
    model, optimizer, masks = trained("sgd", steps=2)
    step(model, optimizer, 2)
    layer = model[3]
    if what == "weight":
        layer.values.data[1] = float("nan")
    elif what == "momentum":
        optimizer.state[layer.values]["momentum_buffer"][1] = float("inf")
    else:
        signal = next(s for s in masks._signals if s.layer is layer)
        free = torch.ones(17 * 112, dtype=torch.bool)
        free[layer.pattern.keys()] = False
        signal.buffers["momentum_buffer"][free] = float("inf")
    keys = layer.pattern.keys()
    with pytest.raises(
        FloatingPointError, match=f"layer '3': non-finite {what} at the mask update"
    ):
        masks.step()
    assert torch.equal(layer.pattern.keys(), keys)
