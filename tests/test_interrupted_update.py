"""A mask update that Ctrl-C or an error stops half way: no checkpoint of it, and the way back."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import make_model, sparse, train

from sparse_kernels.nn import SparseLayer
from sparse_kernels.training import (
    SparseMomentum,
    apply_change,
    load_checkpoint,
    save_checkpoint,
    sparse_momentum,
)

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, EVERY = 20, 5


def build(density: float = 0.3, **options: Any) -> Any:
    model = make_model(density=density)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"total_steps": STEPS, "update_every": EVERY, "signal": "exact", **options}
    return model, optimizer, SparseMomentum(model, optimizer, **options)


def weights(model: Any) -> list[torch.Tensor]:
    return [t.clone() for t in model.state_dict().values()]


def interrupt() -> None:
    """Ctrl-C, to the very process."""
    os.kill(os.getpid(), signal.SIGINT)


def no_memory() -> None:
    raise MemoryError("no memory for a layer")


#: Where it strikes in an update of three layers: after which call of which function.
PLACES = {
    "in the plan": (sparse_momentum, "plan_update", 1),
    "between two layers": (apply_change, "rewrite", 2),
    "inside of a layer": (SparseLayer, "set_pattern_", 2),
    "after the last layer": (sparse_momentum.device, "count_elements", 1),
}


def strike(
    patch: pytest.MonkeyPatch, owner: Any, name: str, when: int, action: Callable[[], None]
) -> None:
    """Do `action` after the `when`-th call of owner.name."""
    whole, calls = getattr(owner, name), [0]

    def counted(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        result = whole(*arguments, **options)
        if calls[0] == when:
            action()
        return result

    patch.setattr(owner, name, counted)


@pytest.fixture
def ctrl_c_raises():
    """A test run in the background may have been told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


CASES = [(place, interrupt, KeyboardInterrupt) for place in PLACES] + [
    (place, no_memory, MemoryError)
    for place in ("in the plan", "between two layers", "inside of a layer")
]


@pytest.mark.parametrize(("place", "action", "raised"), CASES)
def test_no_checkpoint_is_taken_of_half_an_update(
    place, action, raised, ctrl_c_raises, tmp_path: Path, monkeypatch
) -> None:
    whole = build()
    train(*whole, STEPS)
    parts = build()
    train(*parts, 8)
    kept = save_checkpoint(tmp_path, 8, *parts)
    with monkeypatch.context() as patch:
        strike(patch, *PLACES[place], action)
        with pytest.raises(raised):
            train(*parts, STEPS, skip=8)
    message = f"after step 10 was stopped half way by a {raised.__name__}"
    for wrong in (
        parts[2].state_dict,
        parts[2].step,
        lambda: save_checkpoint(tmp_path, 10, *parts),
    ):
        with pytest.raises(RuntimeError, match=message):
            wrong()
    assert [p.name for p in tmp_path.iterdir() if "step" in p.name] == [kept.name]
    load_checkpoint(tmp_path, *parts)
    train(*parts, STEPS, skip=8)
    assert all(map(torch.equal, weights(whole[0]), weights(parts[0])))
    parts[2].state_dict()


def test_an_update_that_was_refused_changed_nothing_and_is_no_half_one() -> None:
    """A number that is not finite, found while planning, is an answer and not an accident."""
    model, optimizer, masks = build()
    train(model, optimizer, masks, EVERY - 1)
    before = [layer.pattern.keys().clone() for layer in sparse(model)]
    model[0].values.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="weight"):
        train(model, optimizer, masks, EVERY, skip=EVERY - 1)
    assert all(map(torch.equal, before, (layer.pattern.keys() for layer in sparse(model))))
    assert masks.state_dict()["steps"] == EVERY
