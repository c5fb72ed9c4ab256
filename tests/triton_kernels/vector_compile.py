"""Which element and V x 1 kernels ``compile_table.py`` compiles, and their launches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from sparse_kernels.backends.triton import vector_config as tiles
from sparse_kernels.backends.triton.block_config import Problem
from sparse_kernels.geometry import Conv2dGeometry

SIDES = (1, 4, 16, 32, 2, 8)
OPERATORS = ("conv2d", "conv2d_dgrad", "conv2d_wgrad")
#: (operator, precision, side, configuration, shape, whether it is the default)
Row = tuple[str, str, int, tiles.VectorConfig | tiles.VectorWgradConfig, str, bool]


def rows(precisions: dict[str, tuple[torch.dtype, bool]]) -> Iterator[Row]:
    """Every configuration of every class; plain products of TF32 are those of strict float32."""
    for side in SIDES:
        for op in OPERATORS:
            for precision in ("fp32", "bf16", "tf32"):
                dtype, tf32 = precisions[precision]
                found = tiles.vector_candidates(Problem(op, dtype, (side, 1), 1 << 15, tf32))
                for config in found:
                    if config.dot or not tf32:
                        yield op, precision, side, config, "even", config is found[0]
    for points in (32, 64, 128, 256):  # smaller tiles
        for side in SIDES:
            for op in OPERATORS[:2]:
                for precision in ("fp32", "bf16", "tf32"):
                    dtype, tf32 = precisions[precision]
                    found = tiles.vector_candidates(Problem(op, dtype, (side, 1), points, tf32))
                    if found[0].dot or not tf32:
                        yield op, precision, side, found[0], "even", False
    for side in (1, 16):
        for op in ("linear", "linear_dgrad", "linear_wgrad"):
            yield from _default(op, "bf16", side, "even", precisions)
        for op in OPERATORS:
            yield from _default(op, "fp16", side, "even", precisions)
            yield from _default(op, "fp32", side, "odd", precisions)


def _default(
    op: str, precision: str, side: int, shape: str, precisions: dict[str, tuple[torch.dtype, bool]]
) -> Iterator[Row]:
    dtype, tf32 = precisions[precision]
    found = tiles.vector_candidates(Problem(op, dtype, (side, 1), 1 << 15, tf32))
    yield op, precision, side, found[0], shape, False


def launch(
    op: str, dtype: torch.dtype, tf32: bool, side: int, config: tuple[Any, ...], odd: bool
) -> Any:
    """The launch of a row, made by the launchers from tensors without memory.

    ``odd``: a batch that no vector load divides.
    """
    from sparse_kernels.backends.triton import vector_products, vector_wgrad

    spatial = op.startswith("conv2d")
    g = Conv2dGeometry(512, 512, *((3, 3, 1, 1, 1, 1, 1, 1) if spatial else (1, 1)))
    pixels = (16, 16) if spatial else ()
    images = torch.empty((125 if odd else 128, 512, *pixels), dtype=dtype, device="meta")
    grid_rows, grid_cols = -(-512 // side), g.taps * 512
    capacity = grid_rows * grid_cols // 20
    values = torch.empty((capacity, side, 1), device="meta")
    crow, t_crow = (
        torch.empty(n + 1, dtype=torch.int32, device="meta") for n in (grid_rows, grid_cols)
    )
    list_ = torch.empty(capacity, dtype=torch.int32, device="meta")
    index = (crow, list_, t_crow, list_, list_)
    if op.endswith("_wgrad"):
        problem = Problem(op, dtype, (side, 1), vector_products.points_of(images), tf32)
        parts = torch.empty((4, *values.shape), device="meta")
        return vector_wgrad.wgrad_launch(
            problem, parts, images, images, crow, list_, g, tiles.VectorWgradConfig(*config)
        )
    vector = tiles.VectorConfig(*config)
    if op.endswith("_dgrad"):
        return vector_products.dgrad_launch(op, images, images, values, index, g, vector)
    bias = torch.empty(512, device="meta")
    return vector_products.forward_launch(op, images, images, values, index, bias, g, True, vector)
