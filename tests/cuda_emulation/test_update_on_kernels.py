"""Whole mask updates on the native kernels of a pattern change: masks, values and optimizer state
equal those of the CPU to the last bit, and no torch operator reads a number of the device.

The emulated module stands in for the native one, CPU tensors for GPU tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from device_support import everything, queue, single_thread, trained
from emulator import load

from sparse_kernels.backends import cuda_pattern
from sparse_kernels.training import apply_change, update_on_device
from sparse_kernels.training.layers import sparse_layers


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield from single_thread()


class Recorder:
    """The emulated module as the native one of a build with CUDA; counts the calls."""

    def __init__(self) -> None:
        self.module, self.calls = load(), Counter()

    def build_info(self) -> dict[str, bool]:
        return {"cuda": True}

    def __getattr__(self, name: str):  # type: ignore[no-untyped-def]
        self.calls[name] += 1
        return getattr(self.module, name)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    """To be put in place by `serve`; memory is torch's, so accesses are not held against a list."""
    recorder = Recorder()
    recorder.module.forget_memory()
    recorder.module.set_strict(False)
    try:
        yield recorder
    finally:
        recorder.module.set_strict(True)


def serve(monkeypatch: pytest.MonkeyPatch, recorder: Recorder) -> None:
    queue(monkeypatch)
    monkeypatch.setattr(cuda_pattern, "native", lambda: recorder)
    monkeypatch.setattr(cuda_pattern, "native_or_none", lambda: recorder)
    monkeypatch.setattr(cuda_pattern, "_place", lambda x: (0, 0))
    monkeypatch.setattr(cuda_pattern, "_on_gpu", lambda tensor: True)


CASES = [
    ("sgd", (1, 1), {}),
    ("adam", (4, 1), {}),
    ("plain", (2, 1), {"signal": "gradient"}),
    ("sgd", (1, 1), {"prune": "global_magnitude"}),
    ("sgd", (2, 3), {}),
    ("adam", (1, 1), {"signal": "random", "growth": "random"}),
    ("sgd", (1, 1), {"signal": "sampled", "sample_share": 0.5}),  # its growth is torch's
    ("sgd", (1, 1), {"dense_above": 0.32}),  # some layers are dense-masked: torch's way
]


@pytest.mark.parametrize(("name", "block", "options"), CASES, ids=lambda v: str(v).replace(" ", ""))
def test_training_equals_that_of_the_cpu_to_the_last_bit(
    monkeypatch: pytest.MonkeyPatch,
    recorder: Recorder,
    name: str,
    block: tuple[int, int],
    options: dict,
) -> None:
    expected, optimizer, masks = trained(name, block, steps=7, **options)
    wanted = everything(expected, optimizer)
    serve(monkeypatch, recorder)
    model, other, driver = trained(name, block, steps=7, **options)
    assert driver.updates == masks.updates == 2
    found = everything(model, other)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key
    for _, layer in sparse_layers(model):
        layer.pattern.validate()
    for kernel in ("select_top_k", "build_index", "locate_blocks", "move_blocks"):
        assert recorder.calls[f"cuda_{kernel}"] > 0, kernel


def test_an_update_of_all_layers_is_a_handful_of_calls(
    monkeypatch: pytest.MonkeyPatch, recorder: Recorder
) -> None:
    serve(monkeypatch, recorder)
    trained("sgd", steps=3)
    names = ("select_top_k", "keep_blocks", "merge_keys", "build_index", "locate_blocks")
    calls = {name: recorder.calls[f"cuda_{name}"] for name in names}
    # Two block shapes among three layers, so pruning selects twice, growth once for all.
    assert calls == {
        "select_top_k": 3,
        "keep_blocks": 1,
        "merge_keys": 1,
        "build_index": 1,
        "locate_blocks": 1,
    }
    assert recorder.calls["cuda_move_blocks"] == 3  # values, gradient, momentum


def test_without_the_native_kernels_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    queue(monkeypatch)
    monkeypatch.setattr(cuda_pattern, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(cuda_pattern, "native_or_none", lambda: None)
    calls = Counter()
    monkeypatch.setattr(apply_change, "rewrite_queued", counted(calls, apply_change.rewrite_queued))
    monkeypatch.setattr(update_on_device, "_grow", counted(calls, update_on_device._grow))
    trained("sgd", steps=3)
    assert calls == {"rewrite_queued": 3, "_grow": 3}


def counted(calls: Counter, function):  # type: ignore[no-untyped-def]
    def call(*args, **kwargs):  # type: ignore[no-untyped-def]
        calls[function.__name__] += 1
        return function(*args, **kwargs)

    return call
