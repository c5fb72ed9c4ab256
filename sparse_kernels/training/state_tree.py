"""State as JSON and tensors: dicts, lists, tuples, numbers, text, None; nothing that is executed.

A tree becomes a JSON value and a flat dict of tensors; the JSON names each tensor where it stood.
What JSON cannot say is an object with one key that starts with "$":

    {"$tensor": name, "order": [...]}  a tensor; "order": its dimensions, slowest in memory first
    {"$tuple": [...]}                  a tuple
    {"$items": [[key, value], ...]}    a dict whose keys are not plain text
    {"$counter": [[key, n], ...]}      a collections.Counter (torch's MultiStepLR has one)
    {"$float": "nan" | "inf" | "-inf"}
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_kernels.nn._checkpoint import CheckpointError

_SPECIAL_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode(tree: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """`tree` as plain JSON; its tensors are added to `tensors` under their paths ("state.0.step").

    Tensors keep their memory until they are written.  Raises TypeError naming the place of
    anything that is not plain data.
    """
    if tree is None or isinstance(tree, (bool, str)):
        return tree
    if isinstance(tree, int):
        return int(tree)
    if isinstance(tree, float):
        return float(tree) if math.isfinite(tree) else {"$float": repr(float(tree))}
    if isinstance(tree, Tensor):
        return _encode_tensor(tree, tensors, path)
    if isinstance(tree, (list, tuple)):
        items = [encode(item, tensors, _join(path, i)) for i, item in enumerate(tree)]
        return {"$tuple": items} if isinstance(tree, tuple) else items
    if isinstance(tree, Mapping):
        return _encode_mapping(tree, tensors, path)
    raise TypeError(
        f"checkpoint entry {path or 'state'}: expected a tensor, number, text, None, list, tuple "
        f"or dict, got {type(tree).__name__}; nothing else is stored, because reading it back "
        "would mean to execute code"
    )


def _encode_mapping(tree: Mapping[Any, Any], tensors: dict[str, Tensor], path: str) -> Any:
    plain = all(isinstance(key, str) and not key.startswith("$") for key in tree)
    if plain and not isinstance(tree, Counter):
        return {key: encode(value, tensors, _join(path, key)) for key, value in tree.items()}
    return {
        "$counter" if isinstance(tree, Counter) else "$items": [
            [encode(key, tensors, path), encode(value, tensors, _join(path, key))]
            for key, value in tree.items()
        ]
    }


def _encode_tensor(tensor: Tensor, tensors: dict[str, Tensor], path: str) -> dict[str, Any]:
    name = path or "tensor"
    while name in tensors:  # {"a.b": x, "a": {"b": y}}
        name += "'"
    found = tensor.detach()
    strides = found.stride()
    order = sorted(range(found.dim()), key=lambda i: (-strides[i], i))
    # Gaps and overlaps are not kept, the order of dimensions is: sums over a buffer that came back
    # in another order would round otherwise.
    permuted = order != list(range(found.dim())) and found.permute(order).is_contiguous()
    tensors[name] = found.permute(order) if permuted else found
    return {"$tensor": name, "order": order} if permuted else {"$tensor": name}


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def decode(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that `encode` was given. Raises CheckpointError for anything `encode` never made."""
    if isinstance(node, list):
        return [decode(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    tag = next((key for key in node if key.startswith("$")), None)
    if tag is None:
        return {key: decode(value, tensors) for key, value in node.items()}
    content = node[tag]
    if tag == "$tensor":
        return _decode_tensor(node, tensors)
    if tag == "$float" and content in _SPECIAL_FLOATS:
        return _SPECIAL_FLOATS[content]
    if tag == "$tuple" and isinstance(content, list):
        return tuple(decode(item, tensors) for item in content)
    if tag in ("$items", "$counter") and isinstance(content, list):
        items = _decode_items(content, tensors)
        return Counter(items) if tag == "$counter" else items
    raise CheckpointError(f"state.json: expected a known entry, got {tag} with {content!r:.60}")


def _decode_items(content: list[Any], tensors: Mapping[str, Tensor]) -> dict[Any, Any]:
    try:
        return {decode(key, tensors): decode(value, tensors) for key, value in content}
    except (TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"state.json: expected pairs of key and value, got {error}") from None


def _decode_tensor(node: dict[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
    name, order = node["$tensor"], node.get("order")
    if not isinstance(name, str) or name not in tensors:
        raise CheckpointError(f"state.json names a tensor {name!r:.60} that no file holds")
    tensor = tensors[name]
    if order is None:
        return tensor
    if not isinstance(order, list) or sorted(map(str, order)) != sorted(
        map(str, range(tensor.dim()))
    ):
        raise CheckpointError(
            f"tensor {name!r}: expected an order of {tensor.dim()} dimensions, got {order!r:.60}"
        )
    return tensor.permute([order.index(i) for i in range(tensor.dim())])


def own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, no two in one storage: what safetensors takes."""
    seen: set[int] = set()
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.cpu().contiguous()
        storage = plain.untyped_storage()
        whole = storage.nbytes() == plain.numel() * plain.element_size()
        if not whole or (plain.numel() and storage.data_ptr() in seen):
            plain = plain.clone(memory_format=torch.contiguous_format)
        seen.add(plain.untyped_storage().data_ptr())
        result[name] = plain
    return result
