"""SparseConv2d: nn.Conv2d of which only part of the weights exist."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_kernels import ops
from sparse_kernels.geometry import Conv2dGeometry
from sparse_kernels.nn import _dense, _masked, _probe
from sparse_kernels.nn._initial import check_size
from sparse_kernels.nn._operands import check_operand, operands
from sparse_kernels.nn._select import Keep, choose_pattern
from sparse_kernels.nn.base import COMPRESSED, DENSE_MASKED, SparseLayer
from sparse_kernels.pattern import SparsityPattern

Size = int | Sequence[int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


def _pair(name: str, value: Size) -> tuple[int, int]:
    try:
        pair = tuple(operator.index(side) for side in value)  # type: ignore[union-attr]
    except TypeError:
        pair = ()
        if hasattr(value, "__index__"):
            pair = (operator.index(value), operator.index(value))
    if len(pair) != 2:
        raise ValueError(f"{name} must be one or two integers, got {value!r}")
    return pair[0], pair[1]


def _pads(
    padding: str | tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int, int, int]:
    """Pixels to add at (top, left, bottom, right), by torch's rules."""
    if not isinstance(padding, str):
        return padding[0], padding[1], padding[0], padding[1]
    if padding == "valid":
        return 0, 0, 0, 0
    if padding != "same":
        raise ValueError(f"padding must be integers, 'same' or 'valid', got {padding!r}")
    if stride != (1, 1):
        raise ValueError(f"padding='same' needs stride 1, got stride {stride}; give integers")
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    top, left = total[0] // 2, total[1] // 2
    return top, left, total[0] - top, total[1] - left


class SparseConv2d(SparseLayer):
    """2-d convolution with a sparse weight; a drop-in for ``nn.Conv2d``.

    The weight [out_channels, in_channels/groups, kh, kw] is held as the matrix
    [out_channels, kh*kw*in_channels/groups], columns tap-major; a block spans neither two kernel
    positions nor two groups.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype: as for ``nn.Conv2d``.
        density, block, pattern, generator, capacity: as for ``SparseLinear``; block = (output
            channels, input channels).

    Shape: input [N, C_in, H, W] or [C_in, H, W], output accordingly (feature-major in memory).

    Raises:
        ValueError, TypeError: arguments that torch refuses too, density outside (0, 1], a block
            larger than one group and kernel position, a pattern of another shape.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: str | Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        density: float = 0.1,
        block: int | tuple[int, int] = (1, 1),
        pattern: SparsityPattern | None = None,
        generator: torch.Generator | None = None,
        capacity: int | None = None,
    ) -> None:
        if padding_mode not in get_args(PaddingMode):
            raise ValueError(
                f"padding_mode must be one of {get_args(PaddingMode)}, got {padding_mode!r}"
            )
        kernel, steps = _pair("kernel_size", kernel_size), _pair("stride", stride)
        dilated = _pair("dilation", dilation)
        padded = padding if isinstance(padding, str) else _pair("padding", padding)
        pads = _pads(padded, kernel, steps, dilated)
        in_channels = check_size("in_channels", in_channels)
        out_channels = check_size("out_channels", out_channels)
        groups = check_size("groups", groups)
        geometry = Conv2dGeometry(
            out_channels, in_channels, *kernel, *steps, *pads, *dilated, groups
        ).validate()
        super().__init__(
            geometry.matrix_shape,
            row_parts=groups,
            col_parts=geometry.taps,
            bias=bias,
            density=density,
            block=block,
            pattern=pattern,
            generator=generator,
            capacity=capacity,
            device=device,
            dtype=dtype,
        )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.dilation = kernel, steps, dilated
        self.padding, self.padding_mode, self.groups = padded, padding_mode, groups
        # Other modes than zeros pad the image first and then convolve without padding.
        self._image_pads = (pads[1], pads[3], pads[0], pads[2])
        if padding_mode != "zeros":
            geometry = geometry._replace(pad_top=0, pad_left=0, pad_bottom=0, pad_right=0)
        self.geometry = geometry

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, C_out, H_out, W_out], or both unbatched; ValueError otherwise."""
        y = None
        if self.padding_mode == "zeros":
            if self.storage == DENSE_MASKED:
                y = _masked.conv2d(self, x)
            elif x.dim() == 4 and x.shape[1] == self.in_channels:
                y = ops.short_conv2d(x, operands(self), self.geometry)
        y = self._checked_forward(x) if y is None else y
        if self.probe_pattern is None:
            return y
        if self.padding_mode != "zeros":
            x = functional.pad(x, self._image_pads, mode=self.padding_mode)
        return _probe.attach(self, x, y, self.geometry)

    def _checked_forward(self, x: Tensor) -> Tensor:
        """``forward`` for all that is unusual, or wrong."""
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(
                f"SparseConv2d expected an input [N, {self.in_channels}, H, W] or "
                f"[{self.in_channels}, H, W], got shape {tuple(x.shape)}; permute it to channels "
                "first or build the layer with its number of channels"
            )
        check_operand(self, x)
        if self.padding_mode != "zeros":
            x = functional.pad(x, self._image_pads, mode=self.padding_mode)
        g = self.geometry
        if self.storage == COMPRESSED:
            return ops.conv2d(x, *operands(self), geometry=g)
        rest = (self.values, self.mask, self.bias, _probe.dense(self))
        return ops.masked_conv2d(x, *rest, geometry=g, image_format=self.image_format)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """[C_out, C_in/groups, kh, kw], as torch has it."""
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def matrix_to_weight(self, matrix: Tensor) -> Tensor:
        """[C_out, kh*kw*C_in/groups] as [C_out, C_in/groups, kh, kw]: a channels_last view."""
        taps = matrix.reshape(self.out_channels, *self.kernel_size, self.in_channels // self.groups)
        return taps.permute(0, 3, 1, 2)

    def weight_to_matrix(self, weight: Tensor) -> Tensor:
        """[C_out, C_in/groups, kh, kw] as the tap-major matrix [C_out, kh*kw*C_in/groups]."""
        return weight.permute(0, 2, 3, 1).reshape(self.matrix_shape)

    def to_dense(self) -> nn.Conv2d:
        """An independent ``nn.Conv2d`` with the same weights, bias, mode, device and dtype."""
        module = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,
            "meta",
        )
        return _dense.filled(module, self)

    @classmethod
    def from_dense(
        cls,
        module: nn.Conv2d,
        *,
        density: float = 0.1,
        block: int | tuple[int, int] = (1, 1),
        pattern: SparsityPattern | None = None,
        keep: Keep = "magnitude",
        generator: torch.Generator | None = None,
        nnzb: int | None = None,
    ) -> SparseConv2d:
        """A sparse copy of a convolution; arguments and errors as ``SparseLinear.from_dense``."""
        weight = module.weight.detach()
        matrix = weight.permute(0, 2, 3, 1).flatten(1)
        taps = module.kernel_size[0] * module.kernel_size[1]
        made = choose_pattern(
            matrix,
            density,
            block,
            pattern,
            keep,
            generator,
            row_parts=module.groups,
            col_parts=taps,
            nnzb=nnzb,
        )
        layer = cls(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
            module.bias is not None,
            module.padding_mode,
            "meta",
            weight.dtype,
            pattern=made,
        )
        _dense.take(layer, module, made, matrix)
        return layer

    def extra_repr(self) -> str:
        """Sizes as ``nn.Conv2d`` prints them, then density, nnz and block."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        text += f", stride={self.stride}"
        defaults = {"padding": (0, 0), "dilation": (1, 1), "groups": 1, "padding_mode": "zeros"}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return f"{text}{'' if self.bias is not None else ', bias=False'}, {self._describe()}"
