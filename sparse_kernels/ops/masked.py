"""Dense-masked storage: an ordinary dense weight whose gradient exists only where the mask does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class MaskedWeightFunction(torch.autograd.Function):
    """The dense weight itself; backward masks its gradient and hands the whole one to the probe."""

    @staticmethod
    def forward(dense: Tensor, mask: Tensor, probe: Tensor | None) -> Tensor:
        return dense.view_as(dense)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor | None]:
        (mask,) = ctx.saved_tensors
        # Not a product: inf * 0 would be NaN where no weight exists.
        return grads[0].masked_fill(~mask, 0), None, grads[0] if ctx.needs_input_grad[2] else None


def masked_weight(dense: Tensor, mask: Tensor, probe: Tensor | None = None) -> Tensor:
    """``dense`` [rows, cols], differentiated only where ``mask`` is set.

    Entries of ``dense`` outside the mask must be zero; since they get no gradient, every
    elementwise optimizer leaves them so.  ``probe`` [rows, cols] gets the unmasked gradient.

    Raises:
        ValueError: shapes that differ.
    """
    if mask.shape != dense.shape or (probe is not None and probe.shape != dense.shape):
        shapes = [tuple(t.shape) for t in (dense, mask, probe) if t is not None]
        raise ValueError(f"masked_weight: weight, mask and probe must share a shape, got {shapes}")
    return MaskedWeightFunction.apply(dense, mask, probe)
