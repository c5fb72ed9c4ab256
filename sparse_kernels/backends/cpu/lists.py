"""The native lists of a pattern, kept as long as its index tensors are alive and unchanged."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from sparse_kernels._load import native

# By the identity of the index tensor: tensors compare element by element, and an attribute would
# be copied and pickled with the layer.
_kept: dict[int, tuple[weakref.ref[Tensor], tuple[int, ...], Any]] = {}


def lists_of(index: Tensor, *others: Tensor) -> Any:
    """The ``ListCache`` of a pattern's ``index`` tensor; ``others`` are the rest of its arrays.

    A new one if any of them was written since (torch counts a tensor's writes) or replaced.  Writes
    through ``.data`` are not counted: the lists would then be those of the old pattern.
    None for inference tensors, which count no writes: lists are then made for each call.
    """
    if index.is_inference():
        return None
    try:
        state: tuple[int, ...] = (index._version, index.data_ptr())
        for other in others:
            state += (other._version, other.data_ptr())
    except RuntimeError:  # an inference tensor among the others
        return None
    key = id(index)
    entry = _kept.get(key)
    if entry is not None and entry[1] == state and entry[0]() is index:
        return entry[2]
    cache = native().ListCache()
    _kept[key] = (weakref.ref(index, lambda _: _kept.pop(key, None)), state, cache)
    return cache


def kept_bytes(index: Tensor) -> int:
    """Bytes of the lists kept for an ``index`` tensor now."""
    entry = _kept.get(id(index))
    return int(entry[2].bytes) if entry is not None and entry[0]() is index else 0
