"""Memory layouts of activations: feature-major, the layout of the CPU kernels, and back.

Feature-major means that the logical shape is torch's and the batch is innermost in memory: [N, F]
has strides (1, N), [N, C, H, W] has strides (1, H*W*N, W*N, N). Elementwise torch operators keep
these strides. This module is the only place that knows; it counts the conversions, so that a
report can show them.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ._load import native_or_none

_lock = threading.Lock()
_conversions = 0


def conversions() -> int:
    """Copies made by to_feature_major and from_feature_major since the last reset."""
    return _conversions


def reset_conversions() -> None:
    """Start counting conversions from 0."""
    global _conversions
    with _lock:
        _conversions = 0


def _count_conversion() -> None:
    global _conversions
    if torch.compiler.is_compiling():  # a compiled graph cannot count, and Dynamo takes no lock
        return
    with _lock:
        _conversions += 1


def feature_major_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a feature-major tensor of `shape` [N, ...]; ValueError without
    dimensions.

    A dimension of size 0 counts as 1, as in torch's own contiguous strides. Symbolic sizes are
    accepted.
    """
    if len(shape) == 2:
        return 1, _at_least_one(shape[0])
    if len(shape) == 0:
        raise ValueError("shape: expected at least one dimension (the batch), got none")
    strides = [1]
    step = _at_least_one(shape[0])
    for size in reversed(shape[1:]):
        strides.insert(1, step)
        step = step * _at_least_one(size)
    return tuple(strides)


def _at_least_one(size: Any) -> Any:
    """max(size, 1); of a symbolic size without deciding (guarding on) which it is."""
    return max(size, 1) if type(size) is int else torch.sym_max(size, 1)


def empty_feature_major(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uninitialised tensor of `shape` [N, ...] with exactly feature_major_strides(shape)."""
    return torch.empty_strided(
        tuple(shape), feature_major_strides(shape), dtype=dtype, device=device
    )


def is_feature_major(tensor: Tensor) -> bool:
    """Whether `tensor` [N, ...] is feature-major; strides of size-1 dimensions do not matter."""
    shape, strides = tensor.shape, tensor.stride()
    if len(shape) == 0:
        return False
    if len(shape) == 2 and strides in ((1, shape[0]), (shape[1], 1)):  # the usual cases
        return strides[0] == 1 or shape[0] <= 1 or shape[1] == 0
    expected = 1  # a plain loop: this runs at every operator call
    for axis in (0, *range(len(shape) - 1, 0, -1)):
        if shape[axis] != 1 and strides[axis] != expected:
            return tensor.numel() == 0
        expected *= shape[axis]
    return True


def to_feature_major(tensor: Tensor) -> Tensor:
    """`tensor` [N, ...] itself if it is feature-major, else a feature-major copy (counted).

    Any strides and dtypes are accepted. Contiguous and channels_last float32 tensors on the CPU
    are transposed in tiles by the native module where it is built; everything else goes through
    torch, keeping autograd.
    """
    if is_feature_major(tensor):
        return tensor
    _count_conversion()
    module = native_or_none() if _is_plain_float32(tensor) else None
    if module is not None:
        out = empty_feature_major(tensor.shape, tensor.dtype, tensor.device)
        if _transpose_to(module, out, tensor):
            return out
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0)


def from_feature_major(tensor: Tensor) -> Tensor:
    """`tensor` [N, ...] itself if it is contiguous, else a contiguous copy (counted)."""
    if tensor.is_contiguous():
        return tensor
    _count_conversion()
    module = native_or_none() if _is_plain_float32(tensor) else None
    if module is None or not is_feature_major(tensor):
        return tensor.contiguous()
    out = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    batch = tensor.shape[0]
    features = tensor.numel() // batch
    module.from_feature_major(
        out.data_ptr(), tensor.data_ptr(), batch, features, torch.get_num_threads()
    )
    return out


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is a real one outside of tracing and autograd: its memory may be read."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()  # a mode that traces or fakes must see it all
        and holds_its_numbers(tensor)
        and not (tensor.requires_grad and torch.is_grad_enabled())
    )


def holds_its_numbers(tensor: Tensor) -> bool:
    """Whether the tensor's memory holds just its numbers, so that a pointer to it says all.

    Not those of a fake, user-defined or batched (vmap) tensor, of one whose sign is flipped
    lazily (``x.conj().imag``) or that is zero without memory, nor of any other kind that only
    torch's dispatcher can resolve: such tensors carry other dispatch keys than a new one.
    """
    # The type alone is not enough: the wrappers that torch makes in C++ have type Tensor.
    if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
        return False
    keys = torch._C._dispatch_keys(tensor).raw_repr()
    return keys in CPU_KEYS or keys in _plain_keys(tensor.device.type)


@functools.cache
def _plain_keys(device: str) -> frozenset[int]:
    """Dispatch keys of ordinary tensors of a device, made within inference mode or without."""
    if device == "meta":
        return frozenset()
    found = set()
    with _disable_current_modes(), torch._C.DisableTorchFunction():  # else a mode makes the tensor
        for inference in (False, True):
            with torch.inference_mode(inference):
                found.add(torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr())
    return frozenset(found)


#: Dispatch keys of the tensors on the CPU whose memory holds just their numbers.
CPU_KEYS = _plain_keys("cpu")


def _is_plain_float32(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and is_plain(tensor)


def _transpose_to(module: Any, out: Tensor, tensor: Tensor) -> bool:
    """Fill `out` from a contiguous or channels_last `tensor`; False for other strides."""
    batch = tensor.shape[0]
    threads = torch.get_num_threads()
    if tensor.is_contiguous():
        features = tensor.numel() // batch
        module.to_feature_major(out.data_ptr(), tensor.data_ptr(), batch, features, threads)
        return True
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        channels, pixels = tensor.shape[1], tensor.shape[2] * tensor.shape[3]
        module.nhwc_to_feature_major(
            out.data_ptr(), tensor.data_ptr(), batch, channels, pixels, threads
        )
        return True
    return False


def to_image_format(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    """`tensor` [N, C, H, W] in `memory_format` (contiguous or channels_last): itself or a copy.

    A copy of feature-major memory is counted and made in tiles, as by from_feature_major.
    """
    if tensor.is_contiguous(memory_format=memory_format):
        return tensor
    if not is_feature_major(tensor):
        return tensor.contiguous(memory_format=memory_format)
    if memory_format == torch.contiguous_format:
        return from_feature_major(tensor)
    _count_conversion()
    module = native_or_none() if _is_plain_float32(tensor) else None
    if module is None:
        return tensor.contiguous(memory_format=memory_format)
    out = torch.empty_like(tensor, memory_format=memory_format)
    batch, channels, height, width = tensor.shape
    module.nhwc_from_feature_major(
        out.data_ptr(), tensor.data_ptr(), batch, channels, height * width, torch.get_num_threads()
    )
    return out
