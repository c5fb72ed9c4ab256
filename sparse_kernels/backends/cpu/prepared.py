"""A layer's products, prepared: what no step changes is checked and converted once.

A small product takes a few microseconds, and so did each of the checks of its index arrays, the
look-ups of its lists and the conversions of its twenty arguments.  All of them depend on the index
tensors, the geometry and the shape of the values, which change once in some hundred steps.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_kernels._load import native
from sparse_kernels.backends.cpu.lists import lists_of
from sparse_kernels.backends.cpu.memory import POOLED_FROM, empty_strided
from sparse_kernels.geometry import Conv2dGeometry

Index = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
State = tuple[Any, ...]

#: Of one pattern: a net that meets ever new image sizes must not grow for ever.
MOST_SIZES = 16


class Product:
    """Forward and backward of one layer for one size of image (linear: none).

    Attributes:
        geometry: what it was made for, compared by the caller.
        in_shape, out_shape: of a sample; matrix_shape: of the weight as a matrix.
        values_shape: (capacity, bh, bw).
        state: of the index tensors when it was made (see ``state_of``).
    """

    __slots__ = (
        "_in_strides",
        "_native",
        "_out_strides",
        "_values_strides",
        "geometry",
        "in_shape",
        "matrix_shape",
        "out_shape",
        "state",
        "values_shape",
    )

    def __init__(
        self,
        index: Index,
        state: State,
        values_shape: Sequence[int],
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        geometry: Any,
        conv: Conv2dGeometry,
    ) -> None:
        """``conv``: the geometry as that of a convolution; a linear layer is one of one pixel."""
        self.state, self.geometry, self.values_shape = state, geometry, values_shape
        self.in_shape, self.out_shape = in_shape, out_shape
        self.matrix_shape = conv.matrix_shape
        self._in_strides, self._out_strides = _strides(in_shape), _strides(out_shape)
        _, bh, bw = values_shape
        self._values_strides = (max(bh * bw, 1), max(bw, 1), 1)
        pixels = (*in_shape[1:], *out_shape[1:]) if len(in_shape) > 1 else (1, 1, 1, 1)
        crow, col, t_crow, t_row, t_perm = index
        self._native = native().PreparedProduct(
            [tensor.data_ptr() for tensor in index],
            [1, *pixels, *conv],
            len(in_shape) == 1,
            bh,
            bw,
            values_shape[0],
            lists_of(col, crow),
            lists_of(t_row, t_crow, t_perm),
        )

    def forward(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """The output, feature-major, of a feature-major float32 ``x``."""
        batch = x.shape[0]
        y = _empty(x, batch, self.out_shape, self._out_strides)
        self._native.forward(
            y.data_ptr(),
            x.data_ptr(),
            values.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            batch,
            torch.get_num_threads(),
        )
        return y

    def backward(
        self, grad: Tensor, x: Tensor, values: Tensor, needs: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, values and bias where ``needs`` says so; all operands feature-major."""
        batch = grad.shape[0]
        dx = dv = db = None
        dx_at = dv_at = db_at = 0
        if needs[0]:
            dx = _empty(grad, batch, self.in_shape, self._in_strides)
            dx_at = dx.data_ptr()
        if needs[1]:
            dv = grad.new_empty_strided(self.values_shape, self._values_strides)
            dv_at = dv.data_ptr()
        if needs[2]:
            db = grad.new_empty_strided(self.out_shape[:1], (1,))
            db_at = db.data_ptr()
        self._native.backward(
            dx_at,
            dv_at,
            db_at,
            grad.data_ptr(),
            x.data_ptr(),
            values.data_ptr(),
            batch,
            torch.get_num_threads(),
        )
        return dx, dv, db


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Feature-major strides of the features, for a batch of 1."""
    found, step = [], 1
    for size in reversed(shape):
        found.append(step)
        step *= max(size, 1)
    return tuple(reversed(found))


def _empty(like: Tensor, batch: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """Uninitialised, feature-major [batch, *shape] as float32 ``like``."""
    pitch = batch or 1
    if len(shape) == 1:
        return like.new_empty_strided((batch, shape[0]), (1, pitch))
    full = (batch, *shape)
    scaled = (1, strides[0] * pitch, strides[1] * pitch, strides[2] * pitch)
    floats = math.prod(full)
    if 4 * floats < POOLED_FROM:
        return like.new_empty_strided(full, scaled)
    return empty_strided(full, scaled, floats)


class _Entry:
    """The products of one pattern: one per size of image, as long as ``col`` lives."""

    __slots__ = ("col", "others", "products")

    def __init__(self, index: Index) -> None:
        crow, col, t_crow, t_row, t_perm = index
        key = id(col)
        self.col = weakref.ref(col, lambda _: _kept.pop(key, None))
        self.others = (crow, t_crow, t_row, t_perm)
        self.products: dict[Any, Product] = {}

    def is_of(self, index: Index) -> bool:
        """Whether it belongs to these very tensors."""
        crow, t_crow, t_row, t_perm = self.others
        return (
            index[1] is self.col()
            and index[0] is crow
            and index[2] is t_crow
            and index[3] is t_row
            and index[4] is t_perm
        )


# By the identity of col_indices, as the lists (lists.py): an attribute would be copied with it.
_kept: dict[int, _Entry] = {}


def state_of(index: Index) -> State:
    """Versions, addresses and lengths of index tensors: what a product was prepared for.

    Not for inference tensors, which count no writes (RuntimeError).
    """
    crow, col, t_crow, t_row, t_perm = index
    return (
        crow._version,
        col._version,
        t_crow._version,
        t_row._version,
        t_perm._version,
        crow.data_ptr(),
        col.data_ptr(),
        t_crow.data_ptr(),
        t_row.data_ptr(),
        t_perm.data_ptr(),
        crow.numel(),
        col.numel(),
        t_crow.numel(),
        t_row.numel(),
        t_perm.numel(),
    )


def find(index: Index, size: Any) -> Product | None:
    """The product prepared for these very tensors, unchanged since, and images of this ``size``."""
    entry = _kept.get(id(index[1]))
    if entry is None or not entry.is_of(index):
        return None
    product = entry.products.get(size)
    if product is None or product.state != state_of(index):
        return None
    return product


def keep(index: Index, size: Any, product: Product) -> None:
    """Remember ``product`` as long as the pattern's ``col`` lives."""
    key = id(index[1])
    entry = _kept.get(key)
    if entry is None or not entry.is_of(index) or len(entry.products) >= MOST_SIZES:
        entry = _kept[key] = _Entry(index)
    entry.products[size] = product
