"""What torch's tools may not do to a sparse layer's tensors: refused before anything is changed."""

from __future__ import annotations

import sys

_PARAMETRIZE = "torch.nn.utils.parametrize"


def check_set(layer: object, name: str) -> None:
    """``weight`` cannot be assigned: AttributeError."""
    if name == "weight":
        raise AttributeError(
            f"`weight` of {type(layer).__name__} cannot be assigned: it is a dense copy made on "
            "demand. Write to `values` (the stored blocks), build a layer with "
            "`from_dense(module)`, or get a dense module with `to_dense()`"
        )


def check_register(name: str) -> None:
    """``weight_orig`` and its like, which torch's pruning wants: ValueError."""
    if name.startswith("weight"):
        raise ValueError(
            f"{name!r}: `weight` of a sparse layer is no parameter but made on demand; its "
            "parameter is `values` (the stored blocks). To prune, use SparseMomentum or "
            "set_pattern_(); for weight_norm and other parametrizations use to_dense()"
        )


def check_delete(name: str) -> None:
    """``values`` cannot be parametrized: ValueError.

    torch's parametrize deletes the parameter before it fails on the name (its ModuleDict has a
    method ``values``), and a computed tensor would lose what mask updates and checkpoints write.
    Others may take the parameter away, as FSDP does: so the caller decides.
    """
    if name == "values" and sys._getframe(2).f_globals.get("__name__") == _PARAMETRIZE:
        raise ValueError(
            "`values` of a sparse layer cannot be parametrized: mask updates and checkpoints write "
            "to the parameter itself, and a computed tensor would lose that. Apply the function in "
            "a module around the layer, or to the dense layer from to_dense()"
        )
