"""Which configuration serves a product: the default, or the one that ``tune`` found faster.

A process-wide table by site: what of a call is known without a look at the device. No Triton here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from sparse_kernels.backends.triton import block_config, vector_config
from sparse_kernels.geometry import Conv2dGeometry

#: What ``name_of`` gives.
NAME = re.compile(r"\d+(-\d+){3,4}")


class Site(NamedTuple):
    """A product as the table knows it; a linear layer is a convolution of one pixel by one tap."""

    op: str
    dtype: torch.dtype  # of the activations
    tf32: bool
    block: tuple[int, int]
    batch: int
    image: tuple[int, int]  # height and width of the layer's input, also for gradients
    geometry: Conv2dGeometry
    stored: int  # bits of the capacity: patterns with nearly as many blocks share a choice


_table: dict[Site, Any] = {}


def site_of(
    op: str,
    dtype: torch.dtype,
    block: tuple[int, int],
    batch: int,
    image: Sequence[int],
    geometry: Sequence[int],
    capacity: int,
) -> Site:
    """The site of a call under the present flags of torch.backends."""
    from sparse_kernels.backends.triton.operands import allows_tf32

    height, width = image
    return Site(
        op,
        dtype,
        dtype == torch.float32 and allows_tf32(op),
        block,
        batch,
        (height, width),
        Conv2dGeometry(*geometry),
        capacity.bit_length(),
    )


def problem_of(site: Site) -> block_config.Problem:
    """What the launchers of the site make their choice by; see ``block_config.Problem``."""
    g, (bh, bw) = site.geometry, site.block
    height, width = site.image
    out_height, out_width = g.output_size(height, width)
    points, lists = site.batch * out_height * out_width, 1 << 20
    if site.op.endswith("_dgrad"):
        points = site.batch * -(-height // g.stride_h) * -(-width // g.stride_w)
        lists = g.groups * g.stride_h * g.stride_w * -(-(g.in_channels // g.groups) // bw)
    elif not site.op.endswith("_wgrad"):
        lists = g.groups * -(-(g.out_channels // g.groups) // bh)
    return block_config.Problem(site.op, site.dtype, site.block, points, site.tf32, lists)


def candidates(site: Site) -> tuple[Any, ...]:
    """The configurations to choose from, the default first; all compute the same product."""
    problem = problem_of(site)
    if site.block[1] == 1:
        return vector_config.vector_candidates(problem)
    return block_config.candidates(problem)


def name_of(config: Sequence[int]) -> str:
    """The configuration's numbers in the order of its fields, as docs/gpu.md writes them."""
    return "-".join(str(int(number)) for number in config)


def use(site: Site, name: str) -> None:
    """Serve ``site`` from now on by the candidate of that name; by the default if there is none."""
    found = {name_of(config): config for config in candidates(site)[1:]}
    if name in found:
        _table[site] = found[name]
    else:
        _table.pop(site, None)


def used(site: Site) -> Any | None:
    """The configuration that the table holds for a site; None where the default serves."""
    return _table.get(site)


def lookup(
    op: str,
    dtype: torch.dtype,
    block: tuple[int, int],
    batch: int,
    image: Sequence[int],
    geometry: Sequence[int],
    capacity: int,
) -> Any | None:
    """``used`` for a call; the dimensions are those of ``Site``."""
    if not _table:  # nearly always, and every launch asks
        return None
    return _table.get(site_of(op, dtype, block, batch, image, geometry, capacity))


def clear() -> None:
    """Let every product take its default again."""
    _table.clear()
