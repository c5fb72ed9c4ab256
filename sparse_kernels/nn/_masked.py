"""Forward of dense-masked layers: torch's own product on a view of the weight that masks by itself.

Without a gradient for ``values`` there is nothing to mask.  Otherwise a hook on the view clears the
weight's gradient outside of the mask, in place: the view is made for this one product, so nobody
else can hold that gradient.  A hook costs a tiny layer less than an autograd Function around the
product.  What is unusual goes through ``ops.masked_linear`` and ``ops.masked_conv2d``: probes,
compilation, transforms, inputs in another memory order, 16-bit inputs beside float32 weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import _C, Tensor
from torch.nn import functional

from sparse_kernels import ops
from sparse_kernels.ops.masked_conv2d import (
    FORMATS,
    sees_no_column,
    skips_pixels,
    weight_from_matrix,
)

if TYPE_CHECKING:
    from sparse_kernels.nn.base import SparseLayer
    from sparse_kernels.nn.conv import SparseConv2d
    from sparse_kernels.nn.linear import SparseLinear

#: Elements of a kernel larger than 1x1 whose order torch changes to "contiguous" and back; larger
#: ones go to ``ops.masked_conv2d``, which changes it faster.
TURNED_BY_TORCH = 1 << 16

_is_compiling = torch.compiler.is_compiling
_grad_enabled = _C.is_grad_enabled
_autocast = _C._is_any_autocast_enabled
_modes = _C._len_torch_dispatch_stack
_transforms = _C._are_functorch_transforms_active


def linear(layer: SparseLinear, x: Tensor) -> Tensor | None:
    """[..., in] -> [..., out] of a dense-masked layer; None where something is unusual, or wrong.

    Few steps, because after a backward pass each of them finds cold caches: half a microsecond for
    a call, five for looking at a tensor's dispatch keys.
    """
    parameters = layer._parameters
    values = parameters.get("values")  # nn.Module's own look-up takes as long as all checks here
    if not (_is_usual(layer, values, x) and x.is_contiguous() and "bias" in parameters):
        return None
    bias = parameters["bias"]
    try:
        if not (_grad_enabled() and values.requires_grad):  # type: ignore[union-attr]
            return functional.linear(x, values, bias)  # type: ignore[arg-type]
        if x.dim() == 2 and not _autocast():
            # What functional.linear makes of these: its view of the weight serves as ours.
            weight = values.t()  # type: ignore[union-attr]
            _hook(weight, layer, "transposed", _transposed)
            return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)
        weight = values.view_as(values)  # type: ignore[union-attr,arg-type]
        _hook(weight, layer, "itself", _itself)
        return functional.linear(x, weight, bias)
    except RuntimeError:
        return None  # whoever checks shape and device says it better


def conv2d(layer: SparseConv2d, x: Tensor) -> Tensor | None:
    """[N, C, H, W] -> the convolution's output of a dense-masked layer; None as for ``linear``."""
    g, parameters, image_format = layer.geometry, layer._parameters, layer.image_format
    values = parameters.get("values")
    if not (
        _is_usual(layer, values, x)
        and x.dim() == 4
        and x.is_contiguous(memory_format=FORMATS[image_format])
        and g.pad_top == g.pad_bottom
        and g.pad_left == g.pad_right
        # See ops.masked_conv2d: strides of sides of 1 are free, a single tap has no dilation, and
        # dilated ones may see nothing but padding, strided ones skip pixels.
        and (g.groups == 1 or 1 not in x.shape)
        and (layer.dilation == (1, 1) or _dilates(layer, x))
        and (layer.stride == (1, 1) or not skips_pixels(g))
        and "bias" in parameters
    ):
        return None
    assert values is not None
    masks = _grad_enabled() and values.requires_grad
    if image_format == "channels_last" or layer.kernel_size == (1, 1):
        weight = _weight(layer, values)
        if masks:
            _hook(weight, layer, "weight", _weight)
    elif not masks:
        weight = weight_from_matrix(values, layer.weight_shape, FORMATS[image_format])
    elif values.numel() <= TURNED_BY_TORCH:
        weight = _taps(layer, values)
        _hook(weight, layer, "taps", _taps)
        weight = weight.permute(0, 3, 1, 2).contiguous()
    else:
        return None
    bias, pads = parameters["bias"], (g.pad_top, g.pad_left)
    try:
        return torch.conv2d(x, weight, bias, layer.stride, pads, layer.dilation, layer.groups)
    except RuntimeError:
        return None  # whoever checks shape and device says it better


def _dilates(layer: SparseConv2d, x: Tensor) -> bool:
    return 1 not in layer.kernel_size and not sees_no_column(layer.geometry, x.shape[3])


def _is_usual(layer: SparseLayer, values: Tensor | None, x: Tensor) -> bool:
    """Whether torch's own product may serve: one dtype, no probe, nothing compiled."""
    return not (
        values is None
        or x.dtype is not values.dtype
        or values.is_meta is not x.is_meta  # torch.mm would give memory that nobody wrote
        or (layer.probe is not None and _grad_enabled())
        or _is_compiling()
        or _transforms()  # these and fake tensors have no place for the hook
        or _modes()
    )


# Views of the matrix [rows, cols], of the values as of their mask.


def _itself(layer: SparseLayer, matrix: Tensor) -> Tensor:
    return matrix


def _transposed(layer: SparseLayer, matrix: Tensor) -> Tensor:
    return matrix.t()


def _taps(layer: SparseConv2d, matrix: Tensor) -> Tensor:
    (out, _), (height, width) = layer.matrix_shape, layer.kernel_size
    return matrix.view(out, height, width, -1)


def _weight(layer: SparseConv2d, matrix: Tensor) -> Tensor:
    """[out, C/groups, kh, kw], channels_last; of a 1x1 kernel in both formats at once."""
    (out, _), (height, width) = layer.matrix_shape, layer.kernel_size
    if height == width == 1:
        return matrix.view(out, -1, 1, 1)
    return matrix.view(out, height, width, -1).permute(0, 3, 1, 2)


def _hook(
    weight: Tensor, layer: SparseLayer, name: str, view: Callable[[Any, Tensor], Tensor]
) -> None:
    """Mask the gradient of ``weight``, a ``view`` of the values made for one product.

    The hook is made once for a mask and a view, which ``name`` tells apart.
    """
    mask, made = layer._buffers["mask"], layer._mask_hooks
    if made is None or made[0] is not mask or made[1] != name:
        assert mask is not None
        made = layer._mask_hooks = (mask, name, {0: ops.clearing_hook(view(layer, mask))})
    # Tensor.register_hook in its own words: its handle takes as long as the hook itself.
    weight._backward_hooks = made[2]
    weight.grad_fn._register_hook_dict(weight)  # type: ignore[union-attr]
