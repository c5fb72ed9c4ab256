"""The weight gradient at further places than the stored ones, for a growth signal that samples.

A layer's output passes through unchanged; on the way back the gradient of a never-read leaf is
linear_wgrad or conv2d_wgrad at a pattern of its own. Nothing of the weight matrix's size is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_kernels.ops._library import call
from sparse_kernels.pattern import SparsityPattern


class SampledGradientFunction(torch.autograd.Function):
    """y itself; ``apply(y, x, probe, crow, col, t_crow, t_row, t_perm, geometry)``.

    y: the layer's output [N, ...] for its input x [N, ...]; probe: leaf [places, bh, bw], whose
    gradient is the weight's at the pattern's blocks; geometry: of a convolution, else None.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        y, x, probe, *index, geometry = args
        ctx.geometry, ctx.block = geometry, probe.shape[1:]
        ctx.save_for_backward(x.detach(), *index)
        # An alias that is no view: of a view made in here, autograd refuses to be written to, and
        # an in-place ReLU may follow. No sparse layer keeps its output for its own derivative.
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad,) = grads
        found = None
        if ctx.needs_input_grad[2]:
            x, *index = ctx.saved_tensors
            op = "linear_wgrad" if ctx.geometry is None else "conv2d_wgrad"
            more = () if ctx.geometry is None else (list(ctx.geometry),)
            found = call(op, grad, x.to(grad.dtype), *index, *ctx.block, *more)
        return (grad, None, found, *([None] * 6))


def sampled_gradient(
    y: Tensor,
    x: Tensor,
    probe: Tensor,
    pattern: SparsityPattern,
    geometry: Sequence[int] | None = None,
) -> Tensor:
    """``y``, so that its backward pass adds the weight gradient at ``pattern`` to ``probe.grad``.

    Args:
        y, x: output and input of one sparse layer: [..., out] and [..., in], or images of a
            convolution (batched or not) without padding that ``geometry`` does not know.
        probe: never-read leaf [capacity of pattern, bh, bw] in the dtype of the layer's values.
        pattern: any blocks of the layer's matrix.
        geometry: the 13 integers of ``Conv2dGeometry``; None for a linear layer.

    Returns:
        y's values, shape and strides.

    Raises:
        ValueError: a probe that is not the pattern's.
    """
    expected = (pattern.capacity, *pattern.block)
    if tuple(probe.shape) != expected:
        raise ValueError(
            f"sampled_gradient: probe must be {expected} for this pattern, got "
            f"{tuple(probe.shape)}; make it by layer.make_probe(pattern)"
        )
    sides = 2 if geometry is None else 4
    flat_y, flat_x = _batched(y, sides), _batched(x, sides)
    fixed = None if geometry is None else tuple(geometry)
    out = SampledGradientFunction.apply(flat_y, flat_x, probe, *pattern.tensors(), fixed)
    return out if y.dim() == sides else out.view(y.shape)


def _batched(tensor: Tensor, sides: int) -> Tensor:
    """[N, in] or [N, C, H, W] of any number of leading dimensions."""
    if tensor.dim() == sides:
        return tensor
    return tensor.unsqueeze(0) if sides == 4 else tensor.reshape(-1, tensor.shape[-1])
