"""A mask update on a queued device reads from it once for all layers.

Proven here by modes that refuse whatever waits, and on fake tensors, which have no numbers at all.
On a GPU torch itself reports what waits.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from device_support import make, queue, single_thread, step, trained
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from sparse_kernels import SparseMomentum
from sparse_kernels.training import device
from sparse_kernels.training.layers import sparse_layers


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield from single_thread()


READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "item")


class NoReads(TorchDispatchMode):
    """Refuses operators that make the host wait on CUDA: their results' sizes are data."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not name.lstrip("_").startswith(tuple(r.lstrip("_") for r in READS)), name
        if name in ("index", "index_put", "index_put_", "_unsafe_index"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), "a boolean index"
        if name == "repeat_interleave":
            assert (kwargs or {}).get("output_size") is not None, "a size that the host must read"
        return func(*args, **(kwargs or {}))


class NoNumbers(TorchFunctionMode):
    """Refuses what hands numbers of a tensor to Python without an operator that one could see."""

    REFUSED = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert getattr(func, "__name__", "") not in self.REFUSED, func
        return func(*args, **(kwargs or {}))


@pytest.fixture
def copies(monkeypatch) -> list[int]:
    """Sizes of the copies to the host; only those may happen under the two modes."""
    made: list[int] = []

    def counted(flat: torch.Tensor) -> list[float]:
        made.append(flat.numel())
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return flat.tolist()

    monkeypatch.setattr(device, "_to_host", counted)
    return made


@pytest.mark.parametrize(
    ("name", "block", "options", "expected"),
    [
        ("sgd", (1, 1), {}, 1),
        ("adam", (1, 1), {"signal": "window", "window_tolerance": 0.5}, 1),
        ("plain", (1, 1), {"signal": "gradient"}, 1),
        ("sgd", (1, 1), {"growth": "gradient", "redistribution": "none"}, 1),
        ("sgd", (1, 1), {"redistribution": "nonzero"}, 1),
        ("sgd", (1, 1), {"dense_above": 0.32}, 1),
        ("sgd", (1, 1), {"dense_above": 0.05}, 1),
        ("sgd", (1, 1), {"prune": "global_magnitude"}, 3),  # one more for each block shape
        ("sgd", (2, 3), {}, 2),  # one more: how many elements partial blocks have
    ],
)
def test_an_update_reads_once_for_all_layers(
    monkeypatch, copies, name, block, options, expected
) -> None:
    queue(monkeypatch)
    model, optimizer, masks = trained(name, block, steps=0, **options)
    updates = 0
    for seed in range(9):
        step(model, optimizer, seed)
        copies.clear()
        if (seed + 1) % 3:
            masks.step()
            continue
        masks.steps += 1  # what step() does, without arming the next window: hooks and probes
        with NoNumbers(), NoReads():
            record = masks._update()
        masks._arm()
        assert len(copies) == expected, copies
        updates += 1
        assert record.removed > 0
    assert updates == 3


def test_the_modes_see_every_read_of_the_cpu_path(copies) -> None:
    """The proof can fail: the CPU's own update is refused at once."""
    model, optimizer, masks = trained("sgd", steps=2)
    step(model, optimizer, 2)
    masks.steps += 1
    with pytest.raises(AssertionError), NoNumbers(), NoReads():
        masks._update()
    mask = torch.tensor([True, False])
    for read in (
        lambda: mask.nonzero(),
        lambda: torch.ones(2)[mask],
        lambda: torch.ones(2).masked_select(mask),
        lambda: int(mask.sum()),
        lambda: torch.ones(2).tolist(),
        lambda: bool(mask.any()),
        lambda: torch.arange(2).repeat_interleave(torch.tensor([1, 2])),
        lambda: torch.ones(2).unique(),
    ):
        with pytest.raises(AssertionError), NoNumbers(), NoReads():
            read()


# torch without CUDA cannot slice fake CUDA tensors.
FAKE_DEVICE = "cuda" if torch.backends.cuda.is_built() else "cpu"


def take_numbers_away(masks: SparseMomentum) -> None:
    """Replace everything that an update looks at by fake tensors of the same shapes."""
    state = masks.optimizer.state

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=FAKE_DEVICE)

    for signal in masks._signals:
        layer, known = signal.layer, signal.layer.pattern
        gone = state.pop(layer.values)
        for name, buffer in layer._buffers.items():
            layer._buffers[name] = None if buffer is None else fake(buffer)
        layer.values = nn.Parameter(fake(layer.values))
        layer.values.grad = fake(layer.values)
        signal.view.values = layer.values
        state[layer.values] = {k: fake(t) if t.shape else t for k, t in gone.items()}
        signal.buffers = {k: fake(t) for k, t in signal.buffers.items()}
        layer._pattern = known._with([fake(t) for t in known.tensors()])
        if layer.storage == "dense-masked":
            layer._remember(layer._pattern)
        else:
            layer._register_pattern(layer._pattern)


@pytest.mark.parametrize(("before", "above"), [(1.0, 1.0), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_an_update_runs_on_tensors_that_have_no_numbers(
    monkeypatch, copies, name, before, above
) -> None:
    """Fake tensors: a read raises; with a torch for CUDA, so does pairing them with a CPU tensor.

    Compressed and dense-masked layers, and moves between the two.
    """
    model, optimizer, masks = trained(name, steps=5, dense_above=before)
    stored = {"compressed" if before else "dense-masked"}
    assert {layer.storage for _, layer in sparse_layers(model)} == stored
    step(model, optimizer, 5)
    masks.steps += 1
    monkeypatch.setattr(device, "_to_host", lambda flat: copies.append(1) or [1.0] * flat.numel())
    object.__setattr__(masks.config, "dense_above", above)
    queue(monkeypatch)
    with FakeTensorMode():
        take_numbers_away(masks)
        record = masks._update()
    assert len(copies) == 1 and record.removed > 0
    assert sum(record.nnz_after.values()) == sum(record.nnz_before.values())
    assert bool(record.storage_changes) == (before != above)
    for _, layer in sparse_layers(model):
        assert layer.values.device.type == layer.pattern.device.type == FAKE_DEVICE
        if before == above or not above:  # up to 0.8 of it a dense-masked layer stays what it is
            assert layer.storage == ("compressed" if above else "dense-masked")


# ---- on a GPU ----------------------------------------------------------------------------------


def fed(place: str, copies: list[int] | None = None, steps: int = 12):
    """A model on ``place`` whose gradients are drawn, not computed: updates alone are looked at."""
    model = make(dtype=torch.float32).to(place)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks = SparseMomentum(
        model,
        optimizer,
        total_steps=40,
        update_every=3,
        grad_scale=1.0,
        dense_above=0.4,
        signal="exact",
    )
    draw = torch.Generator().manual_seed(0)
    for number in range(1, steps + 1):
        for _, layer in sparse_layers(model):
            dense = torch.randn(layer.matrix_shape, generator=draw)
            layer.probe.grad = dense.to(place)
            at = layer.pattern
            there = dense * at.mask().cpu()
            grad = there if layer.storage == "dense-masked" else at.compress(there.to(place))
            layer.values.grad = grad.to(place)
            layer.bias.grad = torch.zeros_like(layer.bias)
        optimizer.step()
        if copies is None or number % 3:
            masks.step()
            continue
        masks.steps += 1
        copies.clear()
        torch.cuda.set_sync_debug_mode("error")
        try:
            masks._update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        masks._arm()
        assert len(copies) == 1
    return model, optimizer, masks


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_updates_on_a_gpu_wait_once_and_give_the_masks_of_the_cpu(monkeypatch) -> None:
    copies: list[int] = []

    def counted(flat: torch.Tensor) -> list[float]:
        copies.append(flat.numel())
        torch.cuda.set_sync_debug_mode("default")
        numbers = flat.tolist()
        torch.cuda.set_sync_debug_mode("error")
        return numbers

    expected = fed("cpu")[2]
    monkeypatch.setattr(device, "_to_host", counted)
    masks = fed("cuda", copies)[2]
    assert [r.nnz_after for r in masks.history] == [r.nnz_after for r in expected.history]
    for mine, theirs in zip(masks._signals, expected._signals, strict=True):
        assert torch.equal(mine.layer.pattern.keys().cpu(), theirs.layer.pattern.keys())


def test_drawn_gradients_change_masks_alike_on_the_way_of_devices(monkeypatch) -> None:
    """The GPU's test on the CPU, so that its first run is not on a GPU."""
    expected = fed("cpu")[2]
    queue(monkeypatch)
    masks = fed("cpu")[2]
    assert masks.updates == expected.updates == 4
    assert [r.nnz_after for r in masks.history] == [r.nnz_after for r in expected.history]
    for mine, theirs in zip(masks._signals, expected._signals, strict=True):
        assert torch.equal(mine.layer.pattern.keys(), theirs.layer.pattern.keys())
