"""MaxPool2d and AvgPool2d that keep feature-major activations."""

from __future__ import annotations

from torch import Tensor, nn

from sparse_kernels import ops
from sparse_kernels.nn.norm import serves

#: The operator remembers the winning tap of a window in one byte.
MAX_POOL_TAPS = 255


class MaxPool2d(nn.MaxPool2d):
    """``nn.MaxPool2d`` (same arguments) that keeps feature-major activations feature-major.

    Other layouts, dtypes and devices, ``return_indices`` and windows of more than 255 pixels are
    computed by torch.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H_out, W_out] in the layout of ``input``."""
        if self.return_indices or not serves(input, 4) or taps(self) > MAX_POOL_TAPS:
            return super().forward(input)
        return ops.max_pool2d(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
        )


class AvgPool2d(nn.AvgPool2d):
    """``nn.AvgPool2d`` (same arguments) that keeps feature-major activations feature-major.

    Other layouts, dtypes and devices are computed by torch.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H_out, W_out] in the layout of ``input``."""
        if not serves(input, 4):
            return super().forward(input)
        return ops.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


def taps(pool: nn.MaxPool2d | nn.AvgPool2d) -> int:
    """Pixels in a pooling window."""
    size = pool.kernel_size
    return size * size if isinstance(size, int) else int(size[0]) * int(size[-1])


def halves(pool: nn.MaxPool2d) -> bool:
    """Whether it is the plain pooling of 2x2 pixels, stride 2, that halves an image."""
    sides = {
        "kernel": pool.kernel_size,
        "stride": pool.stride,
        "padding": pool.padding,
        "dilation": pool.dilation,
    }
    found = {name: (v, v) if isinstance(v, int) else tuple(v) for name, v in sides.items()}
    plain = {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0), "dilation": (1, 1)}
    return found == plain and not pool.ceil_mode and not pool.return_indices
