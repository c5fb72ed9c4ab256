"""A captured step without a GPU: its operators and kernel launches, recorded once and replayed.

As in a CUDA graph the host's Python does not run again in a replay, every tensor keeps its memory,
and reading a number on the host is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from sparse_kernels import layout
from sparse_kernels.backends.triton import operands
from sparse_kernels.ops import _library

# Of a queued device: what gives a number to the host, or a shape that depends on numbers.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "_unique2")


class Recording(TorchDispatchMode):
    """Records what runs inside, which runs as usual; ``replay`` does it again in place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.done: list[Callable[[], None]] = []
        self.monkeypatch = monkeypatch

    def record(self, step: Callable[[], object]) -> None:
        """Run ``step`` once and remember its work."""
        run = operands.Launch.run

        def launched(launch: operands.Launch) -> None:
            def again() -> None:
                with _disable_current_modes():
                    run(launch)

            self.done.append(again)
            again()

        with self.monkeypatch.context() as patch:
            patch.setattr(operands.Launch, "run", launched)
            patch.setattr(operands, "_capturing", lambda tensor: True)
            # Layouts of CPU tensors are changed by the native module, which no mode sees; those
            # of a GPU's by torch.
            patch.setattr(layout, "_is_plain_float32", lambda tensor: False)
            with self:
                step()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func.namespace == _library.NAMESPACE:
            with self:  # the parts are recorded, as the graph would hold them
                return _library._KERNELS[name](*args)
        assert name not in WAITING, f"{func} waits for the device"
        out = func(*args, **kwargs)
        # By memory, not by schema: contiguous and reshape are a view or a copy.
        view = not func._schema.is_mutable and _places(out) <= _places((args, kwargs))
        if not view and not name.startswith("empty"):
            self.done.append(lambda: _again(func, args, kwargs, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        """Everything once more, results in the memory that they had."""
        for step in self.done:
            step()


def _places(tensors: Any) -> set[int]:
    """Where the tensors' memory begins, that of their views included."""
    leaves = (leaf for leaf in tree_leaves(tensors) if isinstance(leaf, torch.Tensor))
    return {leaf.untyped_storage().data_ptr() for leaf in leaves}


def _again(func: Any, args: Any, kwargs: Any, before: Any) -> None:
    made = func(*args, **kwargs)
    for old, new in zip(tree_leaves(before), tree_leaves(made), strict=True):
        if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
            old.copy_(new)


def capture(
    step: Callable[[], object], device: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], None]:
    """Run ``step`` once; what is returned runs it again: a CUDA graph, or a ``Recording``."""
    if device == "cpu":
        recording = Recording(monkeypatch)
        recording.record(step)
        return recording.replay
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()  # a capture queues nothing
    return graph.replay
