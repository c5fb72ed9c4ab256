"""What a sparse layer hands to its operator, and whether an input fits it: at every forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_kernels.nn._probe import dense
from sparse_kernels.ops._library import autocast_enabled

if TYPE_CHECKING:
    from sparse_kernels.nn.base import SparseLayer

_HALF = (torch.float16, torch.bfloat16)


def operands(layer: SparseLayer) -> tuple[Any, ...]:
    """values, the five index tensors, bias and probe: what an operator takes after the input."""
    parameters, buffers = layer._parameters, layer._buffers
    usual = "values" in parameters and "bias" in parameters
    if not usual or torch.compiler.is_compiling():
        # A parameter can be parametrized, or be handed over as a plain attribute (FSDP).
        index = (layer.crow_indices, layer.col_indices, layer.t_crow, layer.t_row, layer.t_perm)
        return layer.values, *index, layer.bias, dense(layer)
    # The dictionaries themselves: nn.Module finds an attribute there in 0.8 us each.
    return (
        parameters["values"],
        buffers["crow_indices"],
        buffers["col_indices"],
        buffers["t_crow"],
        buffers["t_row"],
        buffers["t_perm"],
        parameters["bias"],
        dense(layer),
    )


def check_operand(layer: SparseLayer, x: Tensor) -> None:
    """``x`` must be on the layer's device, in its dtype or 16-bit beside float32 values.

    Raises ValueError or TypeError that names both sides.
    """
    values = layer.values
    if x.dtype == values.dtype and x.device == values.device:
        return
    name = type(layer).__name__
    if x.device != values.device:
        raise ValueError(
            f"{name} expected an input on {values.device}, got {x.device}; move the input or the "
            "model with .to()"
        )
    half = x.dtype in _HALF and values.dtype == torch.float32
    # Under autocast the operator casts, as nn.Linear does.
    floats = (torch.float32, *_HALF)
    cast = x.dtype in floats and values.dtype in floats and autocast_enabled(x)
    if not half and not cast:
        raise TypeError(
            f"{name} expected an input of {values.dtype}, got {x.dtype}; convert it with "
            f"x.to({values.dtype})"
        )
