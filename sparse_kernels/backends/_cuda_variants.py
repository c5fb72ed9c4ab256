"""Which of the native CUDA kernels computes a product of a layer, and in what order of rows.

Two variants compute elements and V x 1 blocks, to the same result up to rounding:

    direct   every warp reads the rows of x (of grad) that its own blocks need
    staged   a thread block streams all of them through shared memory and its 128 rows (block rows
             of 128 rows in all; 128 channels in gradients) take what they need from there; in
             weight gradients 96 rows of the gradient and 96 columns of x (staged_wgrad.cuh)

At most 16 points (samples x pixels) have a kernel of their own and no choice. ``tune`` races the
variants on the GPU; a process-wide table by site holds what it found, as for Triton's
configurations (triton/chosen.py). Without an entry the rule of ``default`` serves.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_kernels.backends.triton.chosen import Site, site_of
from sparse_kernels.backends.triton.operands import row_order

DIRECT, STAGED = "direct", "staged"
#: By name, the numbers of csrc/kernels_cuda.h's Variant; None is the launcher's choice.
NUMBERS = {None: 0, DIRECT: 1, STAGED: 2}

FEW_POINTS = 16  # kSmallPoints in csrc/cuda/small.cuh
_STAGED_HEIGHT = 16  # highest block of the staged forward
_ROWS, _POINTS = 128, 64  # of a staged thread block: csrc/cuda/staged.cuh
# The rule's two thresholds: how often a staged row of x must be used by the rows of a thread block,
# and the thread blocks that keep a large GPU's multiprocessors (132 on an H100) busy.
_LEAST_REUSE, _LEAST_BLOCKS = 4.0, 132

_table: dict[Site, str] = {}  # one for all devices: what was timed on one GPU serves all


def candidates(site: Site) -> tuple[str, ...]:
    """The variants to choose from, the rule's first."""
    if not serves_staged(site):
        return (DIRECT,)
    first = default(site)
    return (first, DIRECT if first == STAGED else STAGED)


def serves_staged(site: Site) -> bool:
    """Whether the staged kernel computes it, given 16-byte aligned tensors (torch's own are)."""
    g, size = site.geometry, site.dtype.itemsize
    if g.groups != 1 or site.block[1] != 1 or _points(site) <= FEW_POINTS:
        return False
    if site.op.endswith("_wgrad"):
        return site.batch * size % 4 == 0
    if site.batch * size % 16:
        return False
    if site.op.endswith("_dgrad"):
        return g.stride_h == g.stride_w == 1
    return site.block[0] <= _STAGED_HEIGHT


def default(site: Site) -> str:
    """The variant where nothing was measured. A model, until a GPU has timed it.

    Staging reads every column of x once per thread block, the direct kernel a column for each of
    its blocks. So staging is chosen where a staged row is used at least four times, which is
    density x block rows (channels) of a thread block, and where there are thread blocks enough to
    fill a large GPU: it takes longer per thread block and keeps fewer warps resident.  A weight
    gradient is direct until it is timed: what staging saves there is at most a factor of three in
    reads, and the sums that it keeps leave 16 warps per multiprocessor (docs/cuda.md).
    """
    if not serves_staged(site) or site.op.endswith("_wgrad"):
        return DIRECT
    g, height = site.geometry, site.block[0]
    rows = -(-g.out_channels // height)
    # The capacity is known to its bits only; three quarters of the power above it is its middle.
    stored = 0.75 * (1 << site.stored)
    density = min(1.0, stored / max(1, rows * g.in_channels * g.taps))
    if site.op.endswith("_dgrad"):
        each, lists = _ROWS, g.in_channels
    else:
        tall = next(h for h in (1, 2, 4, 8, 16) if height <= h)  # the kernels' heights
        each, lists = _ROWS // tall, rows
    blocks = -(-lists // each) * -(-_points(site) // _POINTS)
    enough = density * min(each, lists) >= _LEAST_REUSE and blocks >= _LEAST_BLOCKS
    return STAGED if enough else DIRECT


def _points(site: Site) -> int:
    """Points per channel of what is computed."""
    height, width = site.image
    if not site.op.endswith("_dgrad"):
        height, width = site.geometry.output_size(height, width)
    return site.batch * height * width


def use(site: Site, name: str) -> None:
    """Serve ``site`` from now on by the variant of that name; by the rule if it is no candidate."""
    site = site._replace(tf32=False)
    if name in candidates(site):
        _table[site] = name
    else:
        _table.pop(site, None)


def used(site: Site) -> str | None:
    """The variant that the table holds for a site; None where the rule serves."""
    return _table.get(site._replace(tf32=False))


def clear() -> None:
    """Let every product go by the rule again."""
    _table.clear()
    _rule.cache_clear()


# Every call asks: a site takes some 10 us to make, its rule as long.
@functools.lru_cache(maxsize=4096)
def _site(
    op: str,
    dtype: torch.dtype,
    batch: int,
    stored: tuple[int, ...],
    image: tuple[int, ...],
    geometry: tuple[int, ...],
) -> Site:
    capacity, height, width = stored
    site = site_of(op, dtype, (height, width), batch, image, geometry, capacity)
    return site._replace(tf32=False)  # no variant of these kernels depends on it


@functools.lru_cache(maxsize=4096)
def _rule(site: Site) -> str | None:
    return None if _points(site) <= FEW_POINTS else default(site)


def number(
    variant: str | None,
    op: str,
    first: Tensor,
    stored: Sequence[int],
    image: Sequence[int],
    geometry: Sequence[int],
) -> int:
    """What the launcher of ``op`` is told.

    Args:
        variant: what the caller asks for; None goes by the table, then by the rule.
        first: x, or the gradient of the two gradients.
        stored: the shape of the values; ``image`` and ``geometry`` are those of ``Site``.

    Raises:
        ValueError: there is no such variant, or it does not serve this call.
    """
    site = _site(op, first.dtype, first.shape[0], tuple(stored), tuple(image), tuple(geometry))
    if variant is not None:
        if variant not in candidates(site):
            raise ValueError(
                f"{op}: expected a variant of {', '.join(candidates(site))} for this shape, "
                f"got {variant!r}"
            )
        return NUMBERS[variant]
    chosen = _table.get(site) or _rule(site)
    if chosen == STAGED and first.data_ptr() % 16:  # a view into the midst of a tensor
        chosen = DIRECT
    return NUMBERS[chosen]


# -- order of rows ---------------------------------------------------------------------------------


def rows_by_length(crow: Tensor) -> Tensor:
    """Block rows by falling length, int32 [block rows]; Triton's vectors take the same one."""
    return row_order(crow, "rows", lambda: crow.diff())


def channels_by_length(t_crow: Tensor, in_channels: int, groups: int) -> Tensor:
    """Input channels by falling number of blocks over all taps, int32 [in_channels].

    The blocks of a column are counted for each of its groups: how they are shared is not known
    without a look at t_row, and this is but an order.
    """

    def lengths() -> Tensor:
        return t_crow.diff().view(-1, in_channels // groups).sum(0).repeat(groups)

    return row_order(t_crow, ("channels", in_channels, groups), lengths)
