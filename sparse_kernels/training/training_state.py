"""The state of model, optimizer and masks as plain data and tensors: pack, check, unpack.

`check` looks at everything before `unpack` changes anything: a training is never left half old,
half new.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sparse_kernels.nn import _checkpoint as layers_state
from sparse_kernels.nn._checkpoint import CheckpointError

from .layers import sparse_layers
from .sparse_momentum import SparseMomentum

_IMAGE_FORMATS = ("channels_last", "contiguous")
_NEEDED = ("lr", "momentum", "betas")  # what the growth signal reads; torch fills in the others
_INDEX_ENTRIES = ("values", "crow_indices", "col_indices", "mask")


def pack(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, masks: SparseMomentum | None
) -> dict[str, Any]:
    """Parts "model", "plan", "optimizer", "masks"; tensors share memory with what is packed."""
    parts: dict[str, Any] = {
        "model": dict(model.state_dict()),
        "plan": {
            name: {"dense_above": float(layer.dense_above), "image_format": layer.image_format}
            for name, layer in sparse_layers(model)
        },
    }
    if optimizer is not None:
        parts["optimizer"] = optimizer.state_dict()
    if masks is not None:
        parts["masks"] = masks.state_dict()
    return parts


def unpack(
    parts: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    masks: SparseMomentum | None,
) -> None:
    """Load what `check` has found right."""
    model.load_state_dict(parts["model"])
    for name, layer in sparse_layers(model):
        plan = parts["plan"][name]
        layer.dense_above, layer.image_format = plan["dense_above"], plan["image_format"]
    if optimizer is not None:
        optimizer.load_state_dict(parts["optimizer"])
    if masks is not None:
        masks.load_state_dict(parts["masks"])


def check(
    parts: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    masks: SparseMomentum | None,
) -> None:
    """Raise CheckpointError, naming the entry, if a part is not of this model and optimizer.

    Patterns are validated here: ascending, in range, of the layer's shape and block.
    """
    wanted = {"model": model, "plan": model, "optimizer": optimizer, "masks": masks}
    for part, owner in wanted.items():
        if owner is not None and not isinstance(parts.get(part), dict):
            raise CheckpointError(
                f"holds no {part}, only {', '.join(sorted(parts))}; it was written by other calls "
                "than it is read with"
            )
    _check_model(model, parts["model"])
    _check_plan(model, parts["plan"])
    if optimizer is not None:
        _check_optimizer(model, optimizer, parts["optimizer"], parts["model"])
    if masks is not None:
        try:
            masks.check_state_dict(parts["masks"])
        except ValueError as error:
            raise CheckpointError(str(error)) from error


def _check_model(model: nn.Module, state: dict[str, Any]) -> None:
    sparse: set[str] = set()
    for name, layer in sparse_layers(model):
        prefix = f"{name}." if name else ""
        sparse |= {prefix + entry for entry in _INDEX_ENTRIES}
        try:
            if layers_state._read(layer, state, prefix) is None:
                raise CheckpointError("no entry of it")
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"sparse layer {name!r}: {error}") from error
        _check_dtype(prefix + "values", state[prefix + "values"], layer.values)
    own = {key: value for key, value in model.state_dict().items() if key not in sparse}
    missing = sorted(set(own) - set(state))
    unknown = sorted(set(state) - set(own) - sparse)
    if missing or unknown:
        raise CheckpointError(
            f"its model is another: lacks {missing[:4]}, holds {unknown[:4]} besides; build the "
            "model as it was when the checkpoint was written"
        )
    for key, value in own.items():
        if isinstance(value, Tensor):
            _check_dtype(key, state[key], value)
            if state[key].shape != value.shape:
                shapes = f"{tuple(value.shape)}, got {tuple(state[key].shape)}"
                raise CheckpointError(f"{key}: expected shape {shapes}; it is another model's")


def _check_dtype(key: str, found: Any, own: Tensor) -> None:
    if not isinstance(found, Tensor) or found.dtype != own.dtype:
        kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
        raise CheckpointError(
            f"{key}: expected {own.dtype}, got {kind}; move the model to the checkpoint's dtype "
            "first"
        )


def _check_plan(model: nn.Module, plan: dict[str, Any]) -> None:
    for name, _ in sparse_layers(model):
        entry = plan.get(name)
        if not (
            isinstance(entry, dict)
            and isinstance(entry.get("dense_above"), float)
            and entry["dense_above"] >= 0  # NaN is not
            and entry.get("image_format") in _IMAGE_FORMATS
        ):
            raise CheckpointError(
                f"plan of sparse layer {name!r}: expected dense_above (a number) and image_format "
                f"(one of {', '.join(_IMAGE_FORMATS)}), got {entry!r:.80}"
            )


def _check_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    model_state: dict[str, Any],
) -> None:
    groups, held = state.get("param_groups"), state.get("state")
    if not isinstance(groups, list) or not isinstance(held, dict):
        raise CheckpointError("expected an optimizer's state and param_groups")
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    if not all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups):
        raise CheckpointError("a param_group of the optimizer lists no params")
    found = [len(group["params"]) for group in groups]
    if found != sizes:
        raise CheckpointError(
            f"its optimizer has param groups of {found} parameters, this one of {sizes}; build the "
            "optimizer as it was when the checkpoint was written"
        )
    for own, other in zip(optimizer.param_groups, groups, strict=True):
        _check_settings(own, other)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [index for group in groups for index in group["params"]]
    names = {id(p): name for name, p in model.named_parameters()}
    for index, parameter in zip(indices, parameters, strict=True):
        name = names.get(id(parameter))
        if name in model_state:
            _check_shapes(f"optimizer state of {name}", held.get(index, {}), model_state[name])


def _check_settings(own: dict[str, Any], found: dict[str, Any]) -> None:
    """Learning rate, momentum and the like: of the kind that this optimizer has there."""
    for key, value in own.items():
        if key in found and key != "params" and not _alike(value, found[key]):
            raise CheckpointError(
                f"param group of the optimizer: {key} is {found[key]!r:.60}, expected a value such "
                f"as {value!r:.60}"
            )
    for key in ("momentum", "betas"):
        decays = found.get(key, ())
        for decay in decays if isinstance(decays, (tuple, list)) else (decays,):
            if not 0 <= float(decay) < 1:
                raise CheckpointError(f"param group of the optimizer: {key} {decay} not in [0, 1)")
    missing = [key for key in _NEEDED if key in own and key not in found]
    if missing:
        raise CheckpointError(f"param group of the optimizer: {missing} are missing")


def _alike(own: Any, found: Any) -> bool:
    if own is None or isinstance(own, bool):
        return found is None or isinstance(found, bool)
    if isinstance(own, (tuple, list)):
        same = isinstance(found, (tuple, list)) and len(own) == len(found)
        return same and all(_alike(a, b) for a, b in zip(own, found, strict=True))
    if isinstance(own, (int, float, Tensor)):
        if isinstance(found, Tensor):
            return found.numel() == 1
        number = isinstance(found, (int, float)) and not isinstance(found, bool)
        return number and math.isfinite(found)
    return type(own) is type(found)


def _check_shapes(what: str, entries: Any, values: Tensor) -> None:
    """An elementwise optimizer's state has its parameter's shape, or is a number; fused kernels
    trust that."""
    if not isinstance(entries, dict):
        raise CheckpointError(f"{what}: expected a dict, got {type(entries).__name__}")
    for key, entry in entries.items():
        if entry is not None and not isinstance(entry, (Tensor, int, float)):
            raise CheckpointError(f"{what}: {key} must be a tensor or a number, got {entry!r:.60}")
        if isinstance(entry, Tensor) and entry.numel() != 1 and entry.shape != values.shape:
            raise CheckpointError(
                f"{what}: {key} must have the parameter's shape {tuple(values.shape)}, got "
                f"{tuple(entry.shape)}"
            )
