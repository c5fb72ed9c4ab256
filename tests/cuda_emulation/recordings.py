"""Every call of a launcher that the other tests make can be made again here: on another stream or
device, queued, or captured into a graph, and must write the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import emulator
import torch

# The bindings that queue nothing.
ASKING = ("_workspace", "_unusable")
# Where device and stream stand, if they are not the last two arguments.
PLACES = {"cuda_product": 12, "cuda_dgrad": 10, "cuda_wgrad": 12}


class Recording(NamedTuple):
    """One call: its arguments, the tensors it may touch as they were, and what it wrote."""

    function: str
    args: tuple[Any, ...]
    addresses: dict[str, int]
    before: dict[str, torch.Tensor]
    wrote: dict[str, torch.Tensor]


class Recorder:
    """In place of the emulated module: makes each call, and keeps it."""

    def __init__(self) -> None:
        self.module, self.found = emulator.load(), []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.module, name)
        if not name.startswith("cuda_") or name.endswith(ASKING):
            return function

        def call(*args: Any) -> Any:
            there = dict(emulator._there)
            before = {key: tensor.clone() for key, tensor in there.items()}
            self.module.take_done()
            result = function(*args)
            if not self.module.take_done():  # a question, or nothing to do
                return result
            wrote = {k: t.clone() for k, t in there.items() if k.startswith("out_")}
            addresses = {key: tensor.data_ptr() for key, tensor in there.items()}
            self.found.append(Recording(name, args, addresses, before, wrote))
            return result

        return call


def record(work: Callable[[], object]) -> list[Recording]:
    """The calls of launchers that `work` makes and that gave work to a stream."""
    recorder = Recorder()
    with emulator.standing_in(recorder):
        work()
    found: list[Recording] = recorder.found
    return found


class Issue:
    """The same call on tensors of its own, on a stream of a device."""

    def __init__(self, recording: Recording, device: int, stream: int) -> None:
        self.recording = recording
        self.tensors = {name: tensor.clone() for name, tensor in recording.before.items()}
        self.device, self.stream = device, stream

    def register(self, number: int = 0) -> None:
        """As memory of its device only."""
        for name, tensor in self.tensors.items():
            prefix = "out_" if name.startswith("out_") else ""
            emulator.add_memory(self.device, **{f"{prefix}{number}_{name}": tensor})

    def call(self) -> None:
        moved = {
            address: self.tensors[name].data_ptr()
            for name, address in self.recording.addresses.items()
        }
        args = [_moved(arg, moved) for arg in self.recording.args]
        if isinstance(args[-1], list):  # element, device, stream
            args[-1] = [args[-1][0], self.device, self.stream]
        else:
            at = PLACES.get(self.recording.function, len(args) - 2)
            args[at : at + 2] = [self.device, self.stream]
        getattr(emulator.load(), self.recording.function)(*args)

    def reset(self) -> None:
        """Every tensor as it was before the call."""
        for name, tensor in self.tensors.items():
            tensor.copy_(self.recording.before[name])

    def check(self) -> None:
        """AssertionError unless it wrote what the recorded call wrote, to the last bit."""
        for name, wanted in self.recording.wrote.items():
            if "workspace" in name:  # it may hold addresses
                continue
            found = self.tensors[name].contiguous().view(torch.uint8)
            same = torch.equal(found, wanted.contiguous().view(torch.uint8))
            assert same, f"{self.recording.function}: {name} differs from the recorded one"


def _moved(arg: Any, moved: dict[int, int]) -> Any:
    if isinstance(arg, list):
        return [_moved(word, moved) for word in arg]
    return moved.get(arg, arg) if isinstance(arg, int) and not isinstance(arg, bool) else arg
