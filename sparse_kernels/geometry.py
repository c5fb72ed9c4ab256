"""Geometry of a 2-d convolution as plain integers, as operators and native kernels take it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Conv2dGeometry(NamedTuple):
    """Everything but the batch and the image size that fixes a 2-d convolution.

    Padding is given per side because ``padding="same"`` with an even kernel is asymmetric.
    All lengths are in pixels.  The order of the fields is the order of the ``geometry`` integers
    that every ``conv2d`` operator takes.
    """

    out_channels: int
    in_channels: int
    kernel_height: int
    kernel_width: int
    stride_h: int = 1
    stride_w: int = 1
    pad_top: int = 0
    pad_left: int = 0
    pad_bottom: int = 0
    pad_right: int = 0
    dilation_h: int = 1
    dilation_w: int = 1
    groups: int = 1

    @property
    def taps(self) -> int:
        """Number of kernel positions, kh * kw."""
        return self.kernel_height * self.kernel_width

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape of the weight seen as a matrix: [C_out, kh * kw * C_in / groups]."""
        return self.out_channels, self.taps * (self.in_channels // self.groups)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output for an input of ``height`` x ``width`` pixels."""
        reach_h = self.dilation_h * (self.kernel_height - 1) + 1
        reach_w = self.dilation_w * (self.kernel_width - 1) + 1
        out_h = (height + self.pad_top + self.pad_bottom - reach_h) // self.stride_h + 1
        out_w = (width + self.pad_left + self.pad_right - reach_w) // self.stride_w + 1
        return out_h, out_w

    def validate(self) -> Conv2dGeometry:
        """Return self, or raise ValueError naming the first field that makes no sense."""
        positive = ("out_channels", "kernel_height", "kernel_width", "stride_h", "stride_w")
        for name in (*positive, "in_channels", "dilation_h", "dilation_w", "groups"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"Conv2dGeometry.{name} must be at least 1, got {value}")
        for name in ("pad_top", "pad_left", "pad_bottom", "pad_right"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"Conv2dGeometry.{name} must be at least 0, got {value}")
        for name in ("in_channels", "out_channels"):
            value = getattr(self, name)
            if value % self.groups:
                raise ValueError(
                    f"Conv2dGeometry.{name} must be divisible by groups, got {value} and "
                    f"groups={self.groups}"
                )
        return self


def pool_output_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[int, int]:
    """Height and width of a pooling's output, by torch's rule: the last window of ``ceil_mode``
    must start inside the input or its leading padding."""

    def one(axis: int) -> int:
        span = size[axis] + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1
        out = (span + (stride[axis] - 1 if ceil_mode else 0)) // stride[axis] + 1
        if ceil_mode and (out - 1) * stride[axis] >= size[axis] + padding[axis]:
            out -= 1
        return out

    return one(0), one(1)
