"""reserve: pointers that outlive mask updates, and nothing else changed."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from small_training import make_model, sparse, train
from torch import nn

from sparse_kernels import SparseMomentum
from sparse_kernels.nn import SparseLinear
from sparse_kernels.training import reserve
from sparse_kernels.training.rewrite import state_tensors


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pointers(model, optimizer) -> list[int]:
    found = []
    for layer in sparse(model):
        state = state_tensors(optimizer, layer.values).values()
        found += [t.data_ptr() for t in (layer.values, *state, *layer.pattern.tensors())]
    return found


def twelve_updates(room: float | None, block=(1, 1)):
    """Redistribution by magnitude moves weights to the last layer: it outgrows its capacity."""
    model = make_model(block=block, density=0.2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks = SparseMomentum(
        model,
        optimizer,
        total_steps=41,
        update_every=3,
        redistribution="magnitude",
        dense_above=1,
        signal="exact",
    )
    train(model, optimizer, masks, 1)  # momentum exists now
    if room is not None:
        reserve(model, optimizer, room=room)
    before = pointers(model, optimizer)
    train(model, optimizer, masks, 38)
    assert masks.updates == 13
    reallocated = [name for record in masks.history for name in record.reallocated]
    return model, reallocated, before == pointers(model, optimizer)


@pytest.mark.parametrize("block", [(1, 1), (2, 2)])
def test_with_room_no_update_moves_a_pointer_and_the_training_is_the_same(block) -> None:
    plain, reallocated, same = twelve_updates(None, block)
    assert reallocated and not same
    model, reallocated, same = twelve_updates(math.inf, block)
    assert not reallocated and same
    for mine, theirs in zip(sparse(model), sparse(plain), strict=True):
        assert torch.equal(mine.dense_matrix(), theirs.dense_matrix())
        assert mine.pattern == theirs.pattern
        assert mine.values.shape[0] == mine.pattern.block_rows * mine.pattern.block_cols
        assert not mine.values[mine.pattern.nnzb :].any()
        mine.pattern.validate()


def test_room_is_a_multiple_of_what_is_stored_and_never_more_than_all() -> None:
    model = nn.Sequential(
        SparseLinear(10, 10, density=0.2),
        SparseLinear(10, 10, density=0.8),
        SparseLinear(10, 10, density=0.2).to_storage_("dense-masked"),
    )
    kept = [layer.values for layer in model]
    assert reserve(model, room=1.0) == {}
    assert reserve(model, room=2.0) == {"0": 40, "1": 100}
    assert reserve(model, room=1.5) == {}
    assert [layer.values.shape[0] for layer in model] == [40, 100, 10]
    assert all(layer.values is values for layer, values in zip(model, kept, strict=True))
    with pytest.raises(ValueError, match=r"room must be at least 1 .* got 0.5"):
        reserve(model, room=0.5)
