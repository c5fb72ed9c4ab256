"""Shapes for the block kernels: those of tests/cases.py with blocks of 16 and more, and others.

Small, because the interpreter takes a second or more for each product.
"""

from __future__ import annotations

import random

from cases import CONV_CASES, LINEAR_CASES, ConvCase, LinearCase, _conv

from sparse_kernels.geometry import Conv2dGeometry

BLOCKS = ((16, 16), (32, 32), (64, 64), (16, 32), (64, 16), (128, 128))


def _served(block: tuple[int, int]) -> bool:
    return min(block) >= 16


#: Rows that differ in length, a batch of one, sides that are no power of two, an odd number of
#: items in a row (the paired loop's last step).
LINEAR: tuple[LinearCase, ...] = (
    *(case for case in LINEAR_CASES if _served(case.block)),
    LinearCase("batch1", 1, 70, 90, 0.3, (16, 32)),
    LinearCase("batch0", 0, 70, 90, 0.3, (16, 32)),
    LinearCase("empty", 7, 40, 50, block=(16, 16), relu=True, fill="empty"),
    LinearCase("empty-row", 7, 70, 66, 0.4, (16, 16), fill="empty_row"),
    LinearCase("full", 21, 50, 34, block=(16, 16), fill="full", slack=0),
    LinearCase("no-bias-relu", 33, 64, 48, 0.3, (16, 32), bias=False, relu=True),
    LinearCase("sides-24x40", 18, 100, 130, 0.4, (24, 40), relu=True),
    *(LinearCase(f"odd-{b[0]}x{b[1]}", 37, 3 * b[1] - 5, 2 * b[0] + 7, 0.5, b) for b in BLOCKS),
)

CONV: tuple[ConvCase, ...] = (
    *(case for case in CONV_CASES if _served(case.block)),
    ConvCase("batch0", 0, 5, 5, _conv((32, 32), (3, 3), pad=1), 0.4, (16, 16)),
    ConvCase("batch1-relu", 1, 5, 4, _conv((20, 33), (3, 3), pad=1), 0.4, (16, 16), relu=True),
    ConvCase("empty", 2, 4, 4, _conv((32, 32), (3, 3), pad=1), block=(16, 16), fill="empty"),
    ConvCase("empty-row", 1, 4, 5, _conv((32, 64), (3, 3), pad=1), 0.3, (16, 16), fill="empty_row"),
    ConvCase("pointwise", 2, 3, 5, _conv((48, 40), (1, 1)), 0.5, (16, 16)),
    ConvCase("pointwise-stride2", 2, 5, 4, _conv((48, 40), (1, 1), stride=2), 0.5, (16, 32)),
    ConvCase("pointwise-groups", 2, 3, 3, _conv((64, 72), (1, 1), groups=2), 0.5, (16, 16)),
    ConvCase("stride2", 2, 6, 7, _conv((40, 32), (3, 3), stride=2, pad=1), 0.3, (16, 16)),
    ConvCase("stride3-gaps", 2, 7, 8, _conv((32, 40), (2, 2), stride=3, pad=1), 0.4, (16, 16)),
    ConvCase(
        "stride2x1-dilation",
        1,
        8,
        7,
        _conv((20, 32), (3, 2), stride_h=2, dilation=2, pad=2),
        0.4,
        (16, 16),
    ),
    ConvCase(
        "one-sided-pad", 2, 4, 4, _conv((20, 20), (3, 3), pad_left=2, pad_bottom=1), 0.4, (16, 16)
    ),
    ConvCase("pad-beyond-kernel", 1, 2, 3, _conv((20, 20), (2, 2), pad=3), 0.5, (16, 16)),
    ConvCase("same-kernel4", 1, 5, 4, _conv((20, 20), (4, 4), pad=1, pad_right=2), 0.2, (16, 16)),
    ConvCase("one-pixel", 2, 1, 1, _conv((40, 40), (3, 3), pad=1), 0.4, (16, 16)),
    ConvCase(
        "groups2-stride2",
        2,
        5,
        5,
        _conv((68, 72), (3, 3), stride=2, pad=1, groups=2),
        0.2,
        (16, 16),
    ),
    ConvCase("groups3", 1, 4, 3, _conv((57, 60), (2, 2), groups=3), 0.4, (16, 16)),
    ConvCase("sides-24x48", 1, 4, 5, _conv((100, 50), (2, 2), pad=1), 0.4, (24, 48)),
    *(
        ConvCase(f"odd-{b[0]}x{b[1]}", 1, 4, 5, _conv((b[1] + 9, b[0] + 3), (2, 2), pad=1), 0.5, b)
        for b in BLOCKS[1:]
    ),
)


def random_conv_cases(count: int, seed: int) -> list[ConvCase]:
    """Small convolutions of 16 to 40 channels per group with any window, stride and dilation."""
    rng = random.Random(seed)
    found = []
    for i in range(count):
        groups = rng.choice((1, 1, 2))
        g = Conv2dGeometry(
            groups * rng.randint(16, 40),
            groups * rng.randint(16, 40),
            *(rng.randint(1, 3) for _ in range(4)),
            *(rng.randint(0, 2) for _ in range(4)),
            *(rng.randint(1, 2) for _ in range(2)),
            groups,
        ).validate()
        height = max(1, g.dilation_h * (g.kernel_height - 1) + 1 - g.pad_top - g.pad_bottom)
        width = max(1, g.dilation_w * (g.kernel_width - 1) + 1 - g.pad_left - g.pad_right)
        size = (height + rng.randint(0, 3), width + rng.randint(0, 3))
        found.append(ConvCase(f"random-{i}", rng.randint(1, 2), *size, g, 0.4, (16, 16)))
    return found


#: Run on every push, in float32: each says something that no other here says.
CORE_LINEAR = ("batch1", "empty-row", "odd-16x16", "odd-16x32", "sides-24x40", "full")
CORE_CONV = ("stride3-gaps", "groups2-stride2", "odd-64x16", "batch1-relu", "stride2x1-dilation")
