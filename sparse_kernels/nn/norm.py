"""BatchNorm1d and BatchNorm2d that keep feature-major activations, with ReLU in the same pass.

BatchNorm2d can also take the maximum of 2x2 pixels in that pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_kernels import ops
from sparse_kernels.layout import is_feature_major

#: Dtypes by the kind of device. The CPU's kernels compute 16-bit activations by converting them.
_SERVED = {
    "cpu": (torch.float32,),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}


def serves(x: Tensor, dims: int) -> bool:
    """Whether the feature-major operators serve ``x``: batch innermost, float32 on the CPU, or
    float32 and 16 bits on a GPU.

    Anything else is torch's own: converting the layout would cost more than it gains.
    """
    served = _SERVED.get(x.device.type, ())
    return x.dim() == dims and x.dtype in served and is_feature_major(x)


class _FeatureMajorNorm(nn.modules.batchnorm._BatchNorm):
    """What both norms share: the operator where the layout asks for it, else torch's code."""

    _served_dims = 0
    #: Apply ReLU to the output, in the same pass where the operator serves.
    relu: bool = False
    #: Then take the maximum of 2x2 pixels, stride 2 (needs ``relu``; BatchNorm2d only).
    pool: bool = False

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """norm(input) [+ residual], then ReLU if ``relu``; shapes and layout of ``input``.

        With ``pool`` the maximum of 2x2 pixels of that, [N, C, H // 2, W // 2].
        """
        self._check_input_dim(input)
        if not self.pool:
            return self._normalize(input, residual)
        if self.relu and residual is None and self._served(input) and min(input.shape[2:]) > 1:
            return ops.batch_norm_pool(input, **self._arguments())
        y = self._normalize(input, residual)
        return ops.max_pool2d(y, 2) if serves(y, 4) else functional.max_pool2d(y, 2)

    def _served(self, input: Tensor) -> bool:
        plain = all(t is None or t.dtype == torch.float32 for t in (self.weight, self.running_mean))
        return plain and serves(input, self._served_dims)

    def _normalize(self, input: Tensor, residual: Tensor | None) -> Tensor:
        if self._served(input):
            return ops.batch_norm(input, relu=self.relu, residual=residual, **self._arguments())
        y = super().forward(input)
        y = y if residual is None else y + residual
        return functional.relu(y) if self.relu else y

    def _arguments(self) -> dict[str, Any]:
        """What both operators take from the module; counts the batch."""
        tracked = not self.training or self.track_running_stats
        return {
            "running_mean": self.running_mean if tracked else None,
            "running_var": self.running_var if tracked else None,
            "weight": self.weight,
            "bias": self.bias,
            "training": self.training or self.running_mean is None,
            "momentum": self._count_batch(),
            "eps": self.eps,
        }

    def _count_batch(self) -> float:
        """Count this batch as torch does; the weight of its statistics in the running ones."""
        if not (self.training and self.track_running_stats) or self.num_batches_tracked is None:
            return 0.0 if self.momentum is None else self.momentum
        self.num_batches_tracked.add_(1)
        if self.momentum is not None:
            return self.momentum
        return 1.0 / float(self.num_batches_tracked)

    def extra_repr(self) -> str:
        """As torch prints it, and whether ReLU and pooling are included."""
        included = (", relu=True" if self.relu else "") + (", pool=True" if self.pool else "")
        return super().extra_repr() + included


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
