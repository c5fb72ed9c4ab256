"""Loading a state_dict into a sparse layer: validate every index first, then resize in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_kernels.nn._parameter import note_replaced, replace_data
from sparse_kernels.pattern import PatternError, SparsityPattern

if TYPE_CHECKING:
    from sparse_kernels.nn.base import SparseLayer

_INDICES = ("crow_indices", "col_indices")


class CheckpointError(ValueError):
    """A checkpoint's entries do not fit a sparse layer; the message says which and why."""


def load(
    layer: SparseLayer,
    load_tensors: Callable[..., None],
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Body of ``SparseLayer._load_from_state_dict``.

    Adopts the checkpoint's pattern, capacity and storage mode, whatever the layer had; the
    ``values`` object stays (on the meta device with ``assign=True`` torch replaces it).  A
    checkpoint that does not fit leaves the layer as it was and is reported as torch reports.
    """
    lists = (missing_keys, unexpected_keys, error_msgs)
    assign = bool(local_metadata.get("assign_to_params_buffers", False))
    if layer.values.is_meta and not assign:
        # torch warns that this is a no-op; there is no memory to load into.
        load_tensors(state_dict, prefix, local_metadata, strict, *lists)
        return
    try:
        found = _read(layer, state_dict, prefix)
    except (ValueError, TypeError) as problem:
        error_msgs.append(f"{prefix}values of {type(layer).__name__}: {problem}")
        return
    if found is None:
        load_tensors(state_dict, prefix, local_metadata, strict, *lists)
        return
    _resize(layer, found, state_dict[prefix + "values"], assign)
    if assign and not layer.values.is_meta:
        # assign=True adopts the checkpoint's tensors; the Parameter objects stay.
        _assign_data(layer, state_dict, prefix)
        local_metadata = {**local_metadata, "assign_to_params_buffers": False}
    load_tensors(state_dict, prefix, local_metadata, strict, *lists)
    _adopt(layer, found)
    if isinstance(found, SparsityPattern):
        found.col_indices[found.nnzb :] = 0  # past the stored blocks nothing was validated
    layer._zero_outside()


def _read(
    layer: SparseLayer, state_dict: dict[str, Any], prefix: str
) -> SparsityPattern | Tensor | None:
    """The checkpoint's pattern (compressed) or mask (dense-masked); None if it holds neither."""
    held = {name for name in ("values", "mask", "weight", *_INDICES) if prefix + name in state_dict}
    if "weight" in held:
        raise CheckpointError(
            "the checkpoint holds a dense `weight`, expected `values` with its indices; load it "
            "into the dense model first, then call sparsify(model, keep='magnitude')"
        )
    if not held:
        return None
    for name in held:
        if not isinstance(state_dict[prefix + name], Tensor):
            kind = type(state_dict[prefix + name]).__name__
            raise CheckpointError(f"expected a tensor as {name}, got {kind}")
    if held == {"values", "mask"}:
        return _read_mask(layer, state_dict[prefix + "values"], state_dict[prefix + "mask"])
    if held == {"values", *_INDICES}:
        return _read_pattern(layer, *(state_dict[prefix + k] for k in ("values", *_INDICES)))
    raise CheckpointError(
        "expected the entries values, crow_indices, col_indices (compressed) or values, mask "
        f"(dense-masked), got {', '.join(sorted(held))}; save and load whole state_dicts"
    )


def _read_mask(layer: SparseLayer, values: Tensor, mask: Tensor) -> Tensor:
    shapes = (tuple(values.shape), tuple(mask.shape))
    if shapes != (layer.matrix_shape,) * 2 or mask.dtype != torch.bool:
        raise CheckpointError(
            f"expected values and a bool mask of shape {layer.matrix_shape}, got values of shape "
            f"{shapes[0]} and a {mask.dtype} mask of shape {shapes[1]}"
        )
    pattern = SparsityPattern.from_mask(
        mask, block=layer.block, row_parts=layer.row_parts, col_parts=layer.col_parts
    )
    if not torch.equal(pattern.mask(), mask):
        raise CheckpointError(
            f"expected a mask made of whole blocks {layer.block}, got one that cuts blocks; build "
            "the model with the checkpoint's block"
        )
    return mask.to(_home(layer, mask), copy=True)


def _read_pattern(layer: SparseLayer, values: Tensor, crow: Tensor, col: Tensor) -> SparsityPattern:
    if values.dim() != 3 or tuple(values.shape[1:]) != layer.block:
        raise CheckpointError(
            f"expected values of shape [capacity, {layer.block[0]}, {layer.block[1]}], got "
            f"{tuple(values.shape)}; build the model with the checkpoint's block"
        )
    if col.dim() != 1 or col.shape[0] != values.shape[0]:
        raise CheckpointError(
            f"expected one column index per block of values ({values.shape[0]}), got "
            f"col_indices of shape {tuple(col.shape)}"
        )
    stored = int(crow[-1]) if crow.dim() == 1 and crow.numel() else 0
    pattern = SparsityPattern.from_csr(
        crow,
        col[:stored] if 0 <= stored <= col.shape[0] else col,
        layer.matrix_shape,
        layer.block,
        layer.row_parts,
        layer.col_parts,
        capacity=col.shape[0],
    )
    pattern.validate()
    return pattern.to(_home(layer, col))


def _home(layer: SparseLayer, tensor: Tensor) -> torch.device:
    return tensor.device if layer.values.is_meta else layer.values.device


def _resize(
    layer: SparseLayer, found: SparsityPattern | Tensor, values: Tensor, assign: bool
) -> None:
    """Give values and buffers the checkpoint's shapes, so that torch's own loading fits them."""
    if layer.values.shape != values.shape:
        layer.values.grad = None
        replace_data(layer.values, layer.values.data.new_zeros(values.shape))
    _adopt(layer, found)


def _adopt(layer: SparseLayer, found: SparsityPattern | Tensor) -> None:
    if isinstance(found, SparsityPattern):
        layer._register_pattern(found)
    else:
        layer._register_mask(found)


def _assign_data(layer: SparseLayer, state_dict: dict[str, Any], prefix: str) -> None:
    for name, parameter in layer._parameters.items():
        new = state_dict.get(prefix + name)
        if parameter is not None and new is not None and new.shape == parameter.shape:
            parameter.grad = None
            parameter.data = new.detach()
            note_replaced(parameter)


def empty_if_garbage(layer: SparseLayer) -> None:
    """Empty the pattern of a compressed layer whose indices are invalid.

    ``to_empty`` leaves uninitialised memory in the index buffers, which kernels must never read.
    """
    try:
        layer.pattern.validate()
    except PatternError:
        for tensor in layer.pattern.tensors():
            tensor.zero_()
        layer._pattern = None
