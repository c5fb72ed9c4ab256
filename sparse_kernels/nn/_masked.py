"""Forward of dense-masked layers: torch's own product wherever the mask needs no help of it.

Without a gradient for ``values`` there is nothing to mask.  A small weight's gradient is masked by
a hook on ``values``: it costs less than an autograd Function around the product, which would
double the time of a tiny layer.  Everything else goes through ``ops.masked_linear`` and
``ops.masked_conv2d``, which mask in place and mind the memory layouts.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from sparse_kernels import ops
from sparse_kernels.nn._operands import check_operand
from sparse_kernels.ops.masked_conv2d import FORMATS, weight_from_matrix

if TYPE_CHECKING:
    from sparse_kernels.nn.base import SparseLayer
    from sparse_kernels.nn.conv import SparseConv2d
    from sparse_kernels.nn.linear import SparseLinear

#: Elements of a weight whose gradient a hook may copy; larger ones are masked in place.
SMALL_WEIGHT = 1 << 16


def linear(layer: SparseLinear, x: Tensor) -> Tensor:
    """[..., in] -> [..., out] of a dense-masked layer; ValueError or TypeError as check_operand."""
    parameters = layer._parameters
    values = parameters.get("values")  # nn.Module's own look-up takes as long as all checks here
    if _mask_is_minded(layer, values, x) and x.is_contiguous() and "bias" in parameters:
        return functional.linear(x, values, parameters["bias"])  # type: ignore[arg-type]
    check_operand(layer, x)
    return ops.masked_linear(x, layer.values, layer.mask, layer.bias, layer.probe)


def conv2d(layer: SparseConv2d, x: Tensor) -> Tensor:
    """[N, C, H, W] or [C, H, W] -> the convolution's output, of a dense-masked layer."""
    g, parameters = layer.geometry, layer._parameters
    values = parameters.get("values")
    if (
        _mask_is_minded(layer, values, x)
        and x.dim() == 4
        and x.is_contiguous(memory_format=FORMATS[layer.image_format])
        and g.pad_top == g.pad_bottom
        and g.pad_left == g.pad_right
        and "bias" in parameters
    ):
        assert values is not None
        pads, bias = (g.pad_top, g.pad_left), parameters["bias"]
        weight = _weight(layer, values)
        return functional.conv2d(x, weight, bias, layer.stride, pads, layer.dilation, layer.groups)
    check_operand(layer, x)
    return ops.masked_conv2d(
        x,
        layer.values,
        layer.mask,
        layer.bias,
        layer.probe,
        geometry=g,
        image_format=layer.image_format,
    )


def _weight(layer: SparseConv2d, values: Tensor) -> Tensor:
    """The weight in the layer's format, by as few operators as torch must differentiate."""
    if layer.image_format == "channels_last":
        (out, _), (height, width) = layer.matrix_shape, layer.kernel_size
        return values.view(out, height, width, -1).permute(0, 3, 1, 2)
    return weight_from_matrix(values, layer.weight_shape, FORMATS[layer.image_format])


def _mask_is_minded(layer: SparseLayer, values: Tensor | None, x: Tensor) -> bool:
    """Whether a plain product with ``values`` is right: no gradient, or one that a hook masks."""
    if (
        values is None
        or x.dtype is not values.dtype
        or x.device != values.device
        or torch.compiler.is_compiling()
    ):
        return False
    if not (torch.is_grad_enabled() and (values.requires_grad or layer.probe is not None)):
        return True
    if layer.probe is not None or values.numel() > SMALL_WEIGHT or not values.is_leaf:
        return False
    # Looked up at the very tensor: a copied, loaded or swapped parameter has no hook yet.
    hooks = values._backward_hooks
    if hooks:
        for hook in hooks.values():  # a plain loop: this runs at every call
            if type(hook) is _MaskHook and hook.layer() is layer:
                return True
    values.register_hook(_MaskHook(layer))
    return True


class _MaskHook:
    """Hook on ``values`` of a dense-masked layer: clears the gradient outside of the mask."""

    def __init__(self, layer: SparseLayer) -> None:
        self.layer = weakref.ref(layer)  # a parameter must not keep its layer alive

    def __call__(self, grad: Tensor) -> Tensor | None:
        layer = self.layer()
        mask = None if layer is None else layer._buffers["mask"]
        # The gradient may be somebody else's too, so the hook makes a new one.
        return None if mask is None else ops.clear_outside(grad, mask)


def _is_of(hook: object, layer: SparseLayer) -> bool:
    return type(hook) is _MaskHook and hook.layer() is layer


def remove_hook(layer: SparseLayer) -> None:
    """Take the hook off ``values`` (a compressed layer's gradient needs none)."""
    values = layer._parameters.get("values")
    hooks = (None if values is None else values._backward_hooks) or {}
    for key in [key for key, hook in hooks.items() if _is_of(hook, layer)]:
        del hooks[key]
