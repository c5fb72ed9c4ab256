"""The emulated module and how tests hand it tensors.

`SPARSE_KERNELS_EMULATION=asan` loads the sanitized variant (with LD_PRELOAD, see test_asan.py),
`SPARSE_KERNELS_EMULATION_MODULE` a module that was built elsewhere, `SPARSE_KERNELS_EMULATION_GRID`
smaller grids (planting.py).
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import emulation_build
import torch

_loaded: dict[str, ModuleType] = {}
_stand_in: Any = None  # what load() returns instead, for recordings.py
_there: dict[str, torch.Tensor] = {}  # what `registered` has registered
# Rows of thread blocks in a grid, as CUDA has it: what is beyond them, a block does in turns.
GRID = int(os.environ.get("SPARSE_KERNELS_EMULATION_GRID", "65535"))
SEED = int(os.environ.get("SPARSE_KERNELS_EMULATION_SEED", "0"))


def load() -> Any:
    """The emulated module, built if its sources changed."""
    return _stand_in or _module()


def _module() -> ModuleType:
    variant = os.environ.get("SPARSE_KERNELS_EMULATION", "checked")
    if variant not in _loaded:
        planted = os.environ.get("SPARSE_KERNELS_EMULATION_MODULE")
        path = Path(planted) if planted else emulation_build.build(variant)
        name = emulation_build.module_name(variant)
        loader = importlib.machinery.ExtensionFileLoader(name, str(path))
        spec = importlib.util.spec_from_file_location(name, path, loader=loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        module.set_max_grid_y(GRID)
        _loaded[variant] = module
    return _loaded[variant]


@contextmanager
def registered(seed: int = SEED, **tensors: torch.Tensor | None) -> Iterator[Any]:
    """Inside, kernels may touch these tensors only, and write only to those named out_...

    Under a seed of its own: the order of blocks, warps and lanes follows from it.
    """
    emulated = load()
    emulated.forget_memory()
    emulated.set_seed(seed)
    add_memory(**tensors)
    try:
        yield emulated
    finally:
        emulated.forget_memory()
        _there.clear()


def add_memory(device: int = -1, **tensors: torch.Tensor | None) -> None:
    """Register more tensors, as memory of one device (-1: of any), until memory is forgotten."""
    for name, tensor in tensors.items():
        if tensor is None or tensor.numel() == 0:
            continue
        span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        size = span * tensor.element_size()
        load().register_memory(tensor.data_ptr(), size, name.startswith("out_"), name, device)
        _there[name] = tensor


@contextmanager
def standing_in(module: Any) -> Iterator[None]:
    """Inside, load() returns `module`."""
    global _stand_in
    _stand_in = module
    try:
        yield
    finally:
        _stand_in = None


@contextmanager
def queued(seed: int = SEED) -> Iterator[Any]:
    """Inside, work waits in the queue of its stream until something synchronizes; which stream
    goes on then is drawn by `seed`.
    """
    module = load()
    module.set_seed(seed)
    module.set_queueing(True)
    try:
        yield module
        module.synchronize()
    finally:
        module.drop_work()
        module.set_queueing(False)


@contextmanager
def small_grids() -> Iterator[None]:
    """Inside, grids have two rows of thread blocks at most, so that blocks do several tiles."""
    load().set_max_grid_y(2)
    try:
        yield
    finally:
        load().set_max_grid_y(GRID)


def address(tensor: torch.Tensor | None) -> int:
    """Its address, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def nan_like(shape: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """An output that shows what was not written."""
    return torch.full(shape, float("nan"), dtype=dtype)
