"""Dropout whose mask is drawn by all threads, and drawn again in the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_kernels import ops


class Dropout(nn.Dropout):
    """``nn.Dropout`` (same arguments, same distribution, other random numbers): ops.dropout.

    Reproducible through torch.manual_seed like torch's own, but the masks are not those that
    ``nn.Dropout`` would draw from the same seed.  Other dtypes than float32 and other devices than
    the CPU are computed by torch, and so is evaluation.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Same shape and layout as ``input``; ``input`` itself, overwritten, with ``inplace``."""
        if not self.training or input.dtype != torch.float32 or input.device.type != "cpu":
            return super().forward(input)
        y = ops.dropout(input, self.p)
        return input.copy_(y) if self.inplace and y is not input else y
