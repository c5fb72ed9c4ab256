"""Giving a parameter another shape without another object."""

from __future__ import annotations

import torch
from torch import Tensor


def replace_data(parameter: Tensor, data: Tensor) -> None:
    """Give ``parameter`` (whose ``.grad`` is None) data of another shape; autograd notices.

    A loss that is still referenced keeps the parameter's gradient accumulator alive, and that
    remembers the old shape: the next backward would refuse its gradient.  torch drops an
    accumulator only where the dtype changes, so the parameter passes through another dtype for a
    moment.  Tensor hooks stay.
    """
    if not data.is_meta and not parameter.is_meta:
        other = torch.float32 if data.dtype == torch.float64 else torch.float64
        parameter.data = torch.empty(0, dtype=other, device=data.device)
    parameter.data = data
    note_replaced(parameter)


def note_replaced(parameter: Tensor) -> None:
    """Count new data as a write: a backward pass of an older product must refuse it.

    torch keeps a leaf for the backward pass by reference and does not count ``.data = ...``, so a
    kernel would read the new memory by the old shape.
    """
    if not parameter.is_inference():  # those have no count, and no backward pass either
        torch.autograd.graph.increment_version(parameter)
