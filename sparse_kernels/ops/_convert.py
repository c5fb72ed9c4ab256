"""One conversion of an activation for all the operators of a step that read it."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_kernels import plan
from sparse_kernels.backends import cpu
from sparse_kernels.layout import (
    from_feature_major,
    is_plain,
    to_feature_major,
    to_image_format,
)


def convert_once(op: str, x: Tensor, values: Tensor) -> Tensor:
    """``x`` in the layout of the backend that serves ``op``: two operators read it in every step.

    Without this, forward and weight gradient (or both gradients) would convert it one by one.  A
    tensor that autograd records is converted by torch, differentiably, where the backend is a
    GPU's; the CPU's own transposition in tiles is faster than that, even twice.
    """
    recorded = x.requires_grad and torch.is_grad_enabled()
    if recorded and x.device.type == "cpu" and plan.forced() is None:
        return x
    if not is_plain(x.detach() if recorded else x):
        return x
    wanted = plan.operand_layout(op, x, values)
    if wanted is None or (recorded and plan.choose(op, x, values) is cpu):
        return x
    if wanted == "feature-major":
        return to_feature_major(x)
    return from_feature_major(x) if x.dim() == 2 else to_image_format(x, torch.channels_last)
