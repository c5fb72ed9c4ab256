"""BatchNorm1d and BatchNorm2d that keep feature-major activations, with ReLU in the same pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_kernels import ops
from sparse_kernels.layout import is_feature_major


def serves(x: Tensor, dims: int) -> bool:
    """Whether the feature-major operators serve ``x``: float32 on the CPU, batch innermost.

    Anything else is torch's own: converting the layout would cost more than it gains.
    """
    return (
        x.dim() == dims
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and is_feature_major(x)
    )


class _FeatureMajorNorm(nn.modules.batchnorm._BatchNorm):
    """What both norms share: the operator where the layout asks for it, else torch's code."""

    _served_dims = 0
    #: Apply ReLU to the output, in the same pass where the operator serves.
    relu: bool = False

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """norm(input) [+ residual], then ReLU if ``relu``; shapes and layout of ``input``."""
        self._check_input_dim(input)
        plain = all(t is None or t.dtype == torch.float32 for t in (self.weight, self.running_mean))
        if plain and serves(input, self._served_dims):
            return self._fused(input, residual)
        y = super().forward(input)
        y = y if residual is None else y + residual
        return functional.relu(y) if self.relu else y

    def _fused(self, x: Tensor, residual: Tensor | None) -> Tensor:
        tracked = not self.training or self.track_running_stats
        return ops.batch_norm(
            x,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            training=self.training or self.running_mean is None,
            momentum=self._count_batch(),
            eps=self.eps,
            relu=self.relu,
            residual=residual,
        )

    def _count_batch(self) -> float:
        """Count this batch as torch does; the weight of its statistics in the running ones."""
        if not (self.training and self.track_running_stats) or self.num_batches_tracked is None:
            return 0.0 if self.momentum is None else self.momentum
        self.num_batches_tracked.add_(1)
        if self.momentum is not None:
            return self.momentum
        return 1.0 / float(self.num_batches_tracked)

    def extra_repr(self) -> str:
        """As torch prints it, and whether ReLU is included."""
        return super().extra_repr() + (", relu=True" if self.relu else "")


class BatchNorm1d(_FeatureMajorNorm, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` (arguments, parameters, state_dict) for feature-major [N, C] too.

    Set ``relu = True`` to apply ReLU to the output.
    """

    _served_dims = 2


class BatchNorm2d(_FeatureMajorNorm, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` (arguments, parameters, state_dict) for feature-major [N, C, H, W] too.

    Set ``relu = True`` to apply ReLU to the output; ``forward(x, residual)`` adds before that.
    """

    _served_dims = 4
