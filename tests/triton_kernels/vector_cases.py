"""Shapes for the element and V x 1 kernels: those of tests/cases.py, and others.

The interpreter takes some three milliseconds for each stored block and tile of points. So it gets
every case with its geometry, block and fill, but with at most `MOST_BLOCKS` stored blocks and about
`MOST_POINTS` points: several tiles with a masked tail. A GPU gets the cases as they are.
"""

from __future__ import annotations

from typing import TypeVar

from cases import CONV_CASES, LINEAR_CASES, ConvCase, LinearCase, _conv
from interpreter_support import INTERPRETING

from sparse_kernels.backends import triton as backend

AnyCase = TypeVar("AnyCase", LinearCase, ConvCase)
#: Stored blocks: some for every row of the largest case, and rows longer than an unrolled step.
MOST_BLOCKS = 100
#: Points of a layer's larger side; the smallest tile has 32.
MOST_POINTS = 100
#: Interpreted with all their points: 49 tiles.
ALL_POINTS = ("pointwise-flat-groups",)

#: Too large for the interpreter; they are there for the CPU kernels' bands and streams.
LARGE = ("lenet-fc1", "dense-rows", "vgg-like", "scatter-linear", "scatter-bands", "wide-batch")


def _wanted(case: LinearCase | ConvCase) -> bool:
    return backend.is_vector(*case.block) and not (
        case.id in LARGE or case.id.endswith("-streamed") or case.id.startswith("kernel11")
    )


def _thinned(case: AnyCase) -> AnyCase:
    """The case as the interpreter gets it."""
    if not INTERPRETING:
        return case
    bh, bw = case.block
    if isinstance(case, LinearCase):
        pixels, count = 1, -(-case.out_features // bh) * -(-case.in_features // bw)
    else:
        g = case.geometry
        rows, cols = g.out_channels // g.groups, g.in_channels // g.groups
        count = g.groups * -(-rows // bh) * g.taps * -(-cols // bw)
        out_h, out_w = g.output_size(case.height, case.width)
        pixels = max(case.height * case.width, out_h * out_w)
    most = case.batch if case.id in ALL_POINTS else max(2, -(-MOST_POINTS // pixels))
    density = min(case.density, MOST_BLOCKS / count)
    return case._replace(density=density, batch=min(case.batch, most))


#: Blocks of every tile height, V that is no power of two, a last block that is cut, uneven rows.
LINEAR: tuple[LinearCase, ...] = (
    *(_thinned(case) for case in LINEAR_CASES if _wanted(case)),
    LinearCase("batch1-16x1", 1, 30, 40, 0.3, (16, 1)),
    LinearCase("odd-3x1", 37, 21, 16, 0.4, (3, 1), relu=True),
    LinearCase("odd-12x1", 21, 23, 31, 0.4, (12, 1)),
    LinearCase("odd-16x1", 45, 50, 41, 0.5, (16, 1), relu=True),
    LinearCase("odd-32x1", 70, 37, 75, 0.4, (32, 1), bias=False),
    LinearCase("empty-row-16x1", 9, 20, 90, 0.4, (16, 1), fill="empty_row"),
)

CONV: tuple[ConvCase, ...] = (
    *(_thinned(case) for case in CONV_CASES if _wanted(case)),
    ConvCase("odd-16x1", 3, 4, 5, _conv((19, 37), (2, 3), pad=1), 0.3, (16, 1), relu=True),
    ConvCase("odd-32x1", 2, 3, 5, _conv((10, 67), (3, 2), stride=2, pad=1), 0.3, (32, 1)),
    ConvCase(
        "groups2-16x1",
        2,
        5,
        4,
        _conv((8, 44), (3, 3), stride_h=2, dilation=2, pad=2, groups=2),
        0.3,
        (16, 1),
    ),
)

#: Run on every push, in float32: each says something that no other here says.
CORE_LINEAR = ("batch1", "empty-row", "odd-3x1", "odd-16x1", "relu-no-bias", "smallest")
CORE_CONV = (
    "groups2-stride-dilation",
    "one-sided-pad",
    "pointwise-stride2",
    "odd-16x1",
    "stride3-gaps",
    "depthwise-twice",
)
