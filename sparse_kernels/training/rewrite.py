"""Move a layer's values, gradient and optimizer state from its pattern to a new one.

The one place where the set of weights changes (as gsplat's strategy ops do it): whatever a
parameter carries moves with it, and the Parameter object stays the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_kernels.nn._parameter import replace_data

COMPRESSED = "compressed"
DENSE_MASKED = "dense-masked"


def added_mask(keys_old: Tensor, keys_new: Tensor) -> Tensor:
    """Bool [new]: True where a key of `keys_new` is not in `keys_old` (both int64, strictly
    increasing).
    """
    return ~locate(keys_old, keys_new)[1]


def locate(keys_old: Tensor, keys_new: Tensor) -> tuple[Tensor, Tensor]:
    """Index into `keys_old` for every new key, and whether it is there."""
    if keys_old.numel() == 0:
        return torch.zeros_like(keys_new), torch.zeros_like(keys_new, dtype=torch.bool)
    index = torch.searchsorted(keys_old, keys_new).clamp(max=keys_old.numel() - 1)
    return index, keys_old[index] == keys_new


def state_tensors(optimizer: torch.optim.Optimizer | None, values: Tensor) -> dict[str, Tensor]:
    """Every optimizer state tensor that has the shape of `values` (momentum_buffer, exp_avg,
    ...).
    """
    state = {} if optimizer is None else optimizer.state.get(values, {})
    return {k: t for k, t in state.items() if isinstance(t, Tensor) and t.shape == values.shape}


@torch.no_grad()
def rewrite(
    layer: Any,
    optimizer: torch.optim.Optimizer | None,
    keys_new: Tensor,
    grown_state: Mapping[str, Tensor] | None = None,
    storage: str | None = None,
) -> bool:
    """Give `layer` the blocks `keys_new`; surviving blocks keep values, gradient and optimizer
    state.

    keys_new: int64 [new], strictly increasing block_row * block_cols + block_col.
    grown_state: per name of an optimizer state tensor (or "values") the [added, bh, bw] content of
    the added blocks in ascending key order (see `added_mask`); everything not named starts at zero.
    storage: "compressed" or "dense-masked"; None keeps the layer's.
    Returns True if storage was newly allocated (capacity outgrown, or another storage); otherwise
    every tensor was rewritten in place and no data_ptr changed.

    Raises ValueError for an unsorted, repeated or out-of-range key, an unknown storage, a
    grown_state that names no state tensor or has another shape.
    """
    target = layer.storage if storage is None else storage
    if target not in (COMPRESSED, DENSE_MASKED):
        raise ValueError(f"storage must be {COMPRESSED!r} or {DENSE_MASKED!r}, got {storage!r}")
    _check_keys(layer, keys_new)
    old = layer.pattern
    keys_old = old.keys()
    index, kept = locate(keys_old, keys_new)
    grown = _checked_grown(layer, optimizer, kept, grown_state or {})

    dense_before = layer.storage == DENSE_MASKED
    target_index, source_index = kept.nonzero().reshape(-1), index[kept]

    def moved(name: str, tensor: Tensor) -> Tensor:
        """Content [new, bh, bw] of one tensor after the move."""
        compact = old.compress(tensor) if dense_before else tensor
        result = compact.new_zeros(keys_new.numel(), *compact.shape[1:])
        result[target_index] = compact[source_index]
        if name in grown:
            result[~kept] = grown[name].to(result.dtype)
        return result

    return _write(layer, optimizer, keys_new, target, moved, check=True)


@torch.no_grad()
def rewrite_queued(
    layer: Any,
    optimizer: torch.optim.Optimizer | None,
    keys_new: Tensor,
    state_at: Mapping[str, Tensor],
    storage: str,
) -> bool:
    """`rewrite` without a number read from the device, for keys that are right by construction.

    keys_new: as for `rewrite`, not checked. state_at: per name of an optimizer state tensor the
    [new, bh, bw] content at ALL blocks of `keys_new`, of which the added ones take theirs: how many
    those are is not known on the host. The result is that of `rewrite`.
    """
    old = layer.pattern
    index, kept = locate(old.keys(), keys_new)
    survives = kept[:, None, None]
    dense_before = layer.storage == DENSE_MASKED

    def moved(name: str, tensor: Tensor) -> Tensor:
        compact = old.compress(tensor) if dense_before else tensor
        content = compact.index_select(0, index)
        start = state_at[name].to(content.dtype) if name in state_at else content.new_zeros(())
        return torch.where(survives, content, start)

    return _write(layer, optimizer, keys_new, storage, moved, check=False)


def _write(
    layer: Any,
    optimizer: torch.optim.Optimizer | None,
    keys: Tensor,
    target: str,
    moved: Any,
    check: bool,
) -> bool:
    """Rewrite pattern and tensors; True if storage was newly allocated."""
    if layer.storage == target == COMPRESSED:
        layer.set_pattern_(keys, check)
        return write_compressed(layer, optimizer, moved)
    return _write_converted(layer, optimizer, keys, target, moved, check)


def _slots(layer: Any, optimizer: torch.optim.Optimizer | None) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of everything shaped like values: the values, their gradient, optimizer
    state.
    """
    values = layer.values
    yield from list(state_tensors(optimizer, values).items())
    if values.grad is not None:
        yield "grad", values.grad
    yield "values", values.detach()  # not .data: autograd must count what is written there


def _assign(layer: Any, optimizer: torch.optim.Optimizer | None, name: str, tensor: Tensor) -> None:
    if name == "values":
        replace_data(layer.values, tensor)
    elif name == "grad":
        layer.values.grad = tensor
    else:
        assert optimizer is not None
        optimizer.state[layer.values][name] = tensor


def write_compressed(layer: Any, optimizer: torch.optim.Optimizer | None, moved: Any) -> bool:
    """Compressed to compressed, tensor by tensor, so that only one temporary of nnz elements
    lives.
    """
    capacity = layer.pattern.capacity
    outgrown = capacity != layer.values.shape[0]
    fresh: dict[str, Tensor] = {}
    for name, tensor in _slots(layer, optimizer):
        content = moved(name, tensor)
        if outgrown:
            out = tensor.new_zeros(capacity, *tensor.shape[1:])
            fresh[name] = out
        else:
            out = tensor
        out[: content.shape[0]] = content
        out[content.shape[0] :] = 0
    if outgrown:
        layer.values.grad = None  # torch checks the shape of a gradient against its parameter
        _assign(layer, optimizer, "values", fresh.pop("values"))
        for name, tensor in fresh.items():
            _assign(layer, optimizer, name, tensor)
    return outgrown


def _write_converted(
    layer: Any,
    optimizer: torch.optim.Optimizer | None,
    keys: Tensor,
    target: str,
    moved: Any,
    check: bool,
) -> bool:
    """Any move with dense-masked storage at one of its ends."""
    changed = layer.storage != target
    slots = dict(_slots(layer, optimizer))
    contents = {name: moved(name, tensor) for name, tensor in slots.items()}
    if changed:
        layer.values.grad = None
        layer.to_storage_(target)
    layer.set_pattern_(keys, check)
    pattern = layer.pattern
    for name in ("values", *(n for n in slots if n != "values")):
        content = contents[name]
        padded = content.new_zeros(pattern.capacity, *content.shape[1:])
        padded[: content.shape[0]] = content
        out = pattern.expand(padded) if target == DENSE_MASKED else padded
        if changed:
            _assign(layer, optimizer, name, out)
        else:
            slots[name].copy_(out)
    return changed


def _check_keys(layer: Any, keys: Tensor) -> None:
    if keys.dtype != torch.int64 or keys.dim() != 1:
        raise ValueError(f"keys_new must be int64 [new], got {keys.dtype} {tuple(keys.shape)}")
    if keys.numel() == 0:
        return
    pattern = layer.pattern
    blocks = pattern.block_rows * pattern.block_cols
    low, high, ordered = int(keys[0]), int(keys[-1]), bool((keys[1:] > keys[:-1]).all())
    if not ordered or low < 0 or high >= blocks:
        raise ValueError(
            f"keys_new must be strictly increasing in [0, {blocks}), got first {low}, last {high}, "
            f"{'increasing' if ordered else 'not strictly increasing'}"
        )


def _checked_grown(
    layer: Any,
    optimizer: torch.optim.Optimizer | None,
    kept: Tensor,
    grown: Mapping[str, Tensor],
) -> Mapping[str, Tensor]:
    if not grown:
        return grown
    known = {"values", *state_tensors(optimizer, layer.values)}
    shape = (int((~kept).sum()), *layer.pattern.block)
    for name, tensor in grown.items():
        if name not in known:
            raise ValueError(f"grown_state has {name!r}, but the state tensors are {sorted(known)}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"grown_state[{name!r}] must be {shape}, got {tuple(tensor.shape)}")
    return grown
