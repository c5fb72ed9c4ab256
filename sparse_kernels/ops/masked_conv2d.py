"""conv2d with a dense, masked weight: torch's own convolution, formats converted once per step.

oneDNN wants images in channels_last or contiguous; which is faster depends on the shape (measured:
contiguous by up to 1.6 times, channels_last by up to 3), so it is an argument, chosen by ``tune``.
A feature-major input is converted once, for forward pass and weight gradient together; output and
input gradient are given back feature-major, or every elementwise operator beside the layer would
pair two layouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparse_kernels.geometry import Conv2dGeometry
from sparse_kernels.layout import is_feature_major, is_plain, to_feature_major, to_image_format
from sparse_kernels.ops.linear import autocast
from sparse_kernels.ops.masked import (
    check_shapes,
    cleared,
    in_dtype_of,
    native_for,
    transformed_weight,
)

#: Formats by the name that layers and reports use.
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def _transposed(source: Tensor, rows: int, cols: int) -> Tensor | None:
    """Each [rows, cols] matrix of a contiguous ``source`` transposed; None without a kernel."""
    native = native_for(source) if source.is_contiguous() and rows > 1 and cols > 1 else None
    if native is None:
        return None
    out = torch.empty_like(source)
    count = source.numel() // (rows * cols)
    threads = torch.get_num_threads()
    native.transpose_each(out.data_ptr(), source.data_ptr(), count, rows, cols, threads)
    return out


def weight_from_matrix(matrix: Tensor, shape: tuple[int, ...], memory_format: Any) -> Tensor:
    """The tap-major matrix as a weight of ``shape`` [out, in/groups, kh, kw] in that format."""
    out, channels, height, width = shape
    if memory_format == torch.contiguous_format and 1 in (height * width, channels):
        # Not the view below: torch reads channels_last from its strides, whatever the image says.
        return matrix.reshape(shape)
    view = matrix.reshape(out, height, width, channels).permute(0, 3, 1, 2)
    if memory_format == torch.channels_last:
        return view
    quick = _transposed(matrix, height * width, channels)
    return view.contiguous() if quick is None else quick.view(shape)


def _matrix(weight: Tensor) -> Tensor:
    """The inverse of ``weight_from_matrix`` for a gradient."""
    out, channels, height, width = weight.shape
    if height * width > 1 and weight.is_contiguous():
        quick = _transposed(weight, channels, height * width)
        if quick is not None:
            return quick.view(out, -1)
    return weight.permute(0, 2, 3, 1).reshape(out, -1)


class MaskedConv2dFunction(torch.autograd.Function):
    """torch's convolution with a masked weight; dW is cleared outside of the mask.

    Arguments of ``apply``: x [N, C, H, W], dense [out, kh*kw*C/groups] (tap-major), mask alike,
    bias [out] or None, probe like dense or None, geometry with equal pads on both sides, the name
    of a format.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, dense, mask, bias, _, geometry, name = args
        g, memory_format = Conv2dGeometry(*geometry), FORMATS[name]
        ctx.geometry, ctx.memory_format = g, memory_format
        ctx.feature_major = x.shape[0] > 1 and not x.is_contiguous() and is_feature_major(x)
        image = _plain_strides(to_image_format(x, memory_format), g.groups)
        weight = weight_from_matrix(dense, _shape(g), memory_format)
        # A second derivative must find x itself; without conversion the two are one tensor.
        ctx.save_for_backward(x, dense, mask, image, weight)
        y = functional.conv2d(image, weight, bias, *_arguments(g))
        return to_feature_major(y) if ctx.feature_major else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, dense, mask, image, weight = ctx.saved_tensors
        g, needs = ctx.geometry, ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph: what was converted has no history
            image, weight = x, _weight_with_history(dense, g)
        stride, padding, dilation, groups = _arguments(g)
        dx, dweight, db = torch.ops.aten.convolution_backward(
            _plain_strides(to_image_format(grads[0], ctx.memory_format), g.groups),
            image,
            weight,
            [g.out_channels] if needs[3] else None,
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            [needs[0], needs[1] or needs[4], needs[3]],
        )
        dw = dp = None
        if needs[1] or needs[4]:
            whole = _matrix(dweight)
            dp = whole if needs[4] else None
            dw = cleared(whole, mask, own=dp is None) if needs[1] else None
        if needs[0] and ctx.feature_major and is_plain(dx):
            dx = to_feature_major(dx)
        return dx, dw, None, db, dp, None, None


def _shape(g: Conv2dGeometry) -> tuple[int, int, int, int]:
    return g.out_channels, g.in_channels // g.groups, g.kernel_height, g.kernel_width


def _arguments(g: Conv2dGeometry) -> tuple[list[int], list[int], list[int], int]:
    """Stride, padding, dilation and groups as torch's convolution takes them.

    One tap cannot be dilated: said so, for torch 2.13 (oneDNN) ends the process where images one
    pixel wide are channels_last, with groups, padding, stride 2 and dilation 2 of a kernel side 1.
    """
    dilation = [
        step if taps > 1 else 1
        for taps, step in ((g.kernel_height, g.dilation_h), (g.kernel_width, g.dilation_w))
    ]
    return [g.stride_h, g.stride_w], [g.pad_top, g.pad_left], dilation, g.groups


def _weight_with_history(matrix: Tensor, g: Conv2dGeometry) -> Tensor:
    """The weight for images whose strides stay as they came; contiguous where they matter."""
    name = torch.channels_last if g.groups == 1 else torch.contiguous_format
    return weight_from_matrix(matrix, _shape(g), name)


def _plain_strides(image: Tensor, groups: int) -> Tensor:
    """An image (or gradient) in its format with that format's own strides, the same memory.

    Strides of dimensions of size 1 are free, but torch 2.13 reads them in convolutions with groups
    and a channels_last weight, and forms a wrong gradient of the weight; not with a contiguous one.
    Outside of autograd, or as_strided would have to be differentiated.
    """
    if groups == 1 or 1 not in image.shape or torch.is_grad_enabled():
        return image
    _, channels, height, width = image.shape
    size = channels * height * width
    plain = (size, height * width, width, 1)
    if not image.is_contiguous():
        plain = (size, 1, width * channels, channels)
    return image.as_strided(image.shape, plain)


def sees_no_column(g: Conv2dGeometry, width: int) -> bool:
    """Whether a dilated kernel meets no column of images so wide, only their padding.

    There torch 2.13 (oneDNN) ends the process in float32 where images are channels_last, or may be
    read so.  Tried: widths 1 to 4, 1 to 3 taps, strides and dilations 1 to 4, padding 0 to 5.
    """
    if g.dilation_w == 1 or g.kernel_width == 1:
        return False
    taps = range(0, g.kernel_width * g.dilation_w, g.dilation_w)
    start = -g.pad_left
    while start + taps[-1] < width + g.pad_right:  # compares only: a symbolic width stays symbolic
        if any(0 <= start + tap < width for tap in taps):
            return False
        start += g.stride_w
    return True


def skips_pixels(g: Conv2dGeometry) -> bool:
    """Whether one tap strides over images of fewer than 8 channels.

    There torch 2.13 (oneDNN) writes past the memory of the weight's gradient in float32 where
    images are channels_last.  Tried: 3 and 4 channels do, 8, 12 and 16 do not, nor stride 1.
    """
    strides = g.stride_h > 1 or g.stride_w > 1
    return strides and g.kernel_height == g.kernel_width == 1 and g.in_channels < 8 * g.groups


def masked_conv2d(
    x: Tensor,
    dense: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    probe: Tensor | None = None,
    *,
    geometry: Sequence[int],
    image_format: str = "channels_last",
) -> Tensor:
    """``functional.conv2d`` with a weight that is differentiated only inside its mask.

    Args:
        x: [N, C, H, W] or [C, H, W], any strides; feature-major in gives feature-major out.
        dense: the weight as its tap-major matrix [out, kh*kw*C/groups], zero outside of the mask;
            mask: bool, alike.
        bias: [out] or None.
        probe: like dense, or None; its gradient is the unmasked weight gradient.
        geometry: the integers of ``Conv2dGeometry``.
        image_format: "channels_last" or "contiguous": how torch's convolution gets its images.

    Raises:
        ValueError: shapes that differ, an unknown format.
    """
    check_shapes(dense, mask, probe)
    if image_format not in FORMATS:
        raise ValueError(f"image_format must be one of {', '.join(FORMATS)}, got {image_format!r}")
    x = autocast(x, dense)
    dense, bias = in_dtype_of(x, dense, bias)
    g = Conv2dGeometry(*geometry)
    uneven = (g.pad_top, g.pad_left) != (g.pad_bottom, g.pad_right)
    if uneven or skips_pixels(g) or sees_no_column(g, x.shape[-1]):
        # Uneven: "same" with an even kernel, where torch's convolution pads both sides alike.
        x = functional.pad(x, (g.pad_left, g.pad_right, g.pad_top, g.pad_bottom))
        g = g._replace(pad_top=0, pad_left=0, pad_bottom=0, pad_right=0)
    if skips_pixels(g):
        x = x[..., :: g.stride_h, :: g.stride_w]  # what is read, the padding among it
        g = g._replace(stride_h=1, stride_w=1)
    images = x if x.dim() == 4 else x.unsqueeze(0)
    weight = transformed_weight(dense, mask, probe)
    if weight is None:
        y = MaskedConv2dFunction.apply(images, dense, mask, bias, probe, tuple(g), image_format)
    else:
        taps = _weight_with_history(weight, g)
        y = functional.conv2d(images, taps, bias, *_arguments(g))
    return y if x.dim() == 4 else y.squeeze(0)
