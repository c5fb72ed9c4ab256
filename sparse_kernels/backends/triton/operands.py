"""Operands of the Triton kernels: precision, layouts, the order of a pattern's rows."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_kernels.layout import from_feature_major, to_image_format


class Launch(NamedTuple):
    """One kernel launch; the compile tests read it with tensors of device "meta"."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # tensors, integers and compile-time constants, by parameter
    num_warps: int
    num_stages: int

    def run(self) -> None:
        """Queue the kernel on the current stream of the tensors' device."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        device = next(v.device for v in self.arguments.values() if isinstance(v, Tensor))
        if device.type == "cuda":
            with torch.cuda.device(device):  # Triton launches on the current device
                self.kernel[self.grid](**self.arguments, **options)
        else:
            self.kernel[self.grid](**self.arguments, **options)


def allows_tf32(op: str) -> bool:
    """Whether torch.backends lets float32 products of ``op`` be rounded to TF32."""
    backends: Any = torch.backends  # its stubs lack cudnn.conv
    holder = backends.cudnn.conv if op.startswith("conv2d") else backends.cuda.matmul
    return bool(holder.fp32_precision == "tf32")


def batch_major(x: Tensor) -> Tensor:
    """Activation [N, F] contiguous, or [N, C, H, W] channels_last; a counted copy if it is not."""
    x = x.detach()
    if x.dim() == 2:
        return from_feature_major(x)
    return to_image_format(x, torch.channels_last)


def empty_images(shape: tuple[int, int, int, int], like: Tensor) -> Tensor:
    """Uninitialised channels_last images [N, C, H, W] of the dtype and device of ``like``."""
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def check_pixels(op: str, *counts: int) -> None:
    """Points are counted in 32 bits; their offsets in memory are not."""
    if max(counts) >= 2**31 - 2**16:
        raise ValueError(
            f"{op}: at most {2**31 - 2**16 - 1} rows or pixels per call, got {max(counts)}; "
            "split the batch"
        )


def needs_long(*tensors: Tensor) -> bool:
    """Whether an offset into one of the tensors may not fit into 32 bits."""
    # A masked lane may point a little outside of its tensor; half the range leaves room for that.
    return any(tensor.numel() >= 2**30 for tensor in tensors)


# -- order of rows ---------------------------------------------------------------------------------

_orders: dict[tuple[int, Any], tuple[weakref.ref[Tensor], int, Tensor]] = {}


def row_order(pointer: Tensor, kind: Any, lengths: Callable[[], Tensor]) -> Tensor:
    """Rows by falling length, int32 [rows], computed on the device when the pattern has changed.

    Kept by the identity of the pattern's ``pointer`` tensor and ``kind``; torch counts the writes
    to a tensor, which tell a change. A stale order costs time, never correctness: a captured CUDA
    graph goes on reading the same memory, which the next call outside of the graph brings up to
    date. Inference tensors count no writes; theirs is made for each call.

    One stream at a time: a layer's first call, and its first after a change of the pattern, write
    memory that all its calls read. Order them before calls of the same layer on other streams.
    """
    if pointer.is_inference() or pointer.device.type == "meta":
        return _sorted(lengths())
    key = (id(pointer), kind)
    entry = _orders.get(key)
    version = pointer._version
    if entry is not None and entry[0]() is pointer:
        if entry[1] == version or _capturing(pointer):
            return entry[2]
        order = entry[2]
    else:
        entry = order = None
    # Kept for training too, where a tensor made in inference mode could not be written.
    with torch.inference_mode(False), torch.no_grad():
        if order is None:
            order = _sorted(lengths())
        else:
            order.copy_(_sorted(lengths()))
    if entry is not None:
        _orders[key] = (entry[0], version, order)
    elif not _capturing(pointer):  # memory made in a capture belongs to the graph
        _orders[key] = (weakref.ref(pointer, lambda _: _orders.pop(key, None)), version, order)
    return order


def _sorted(lengths: Tensor) -> Tensor:
    return torch.argsort(lengths, descending=True, stable=True).to(torch.int32)


def _capturing(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def bisections(length: int) -> int:
    """Steps of a bisection among ``length`` entries."""
    return max(1, math.ceil(math.log2(max(1, length))) + 1)
