"""The shape table of tests and benchmarks: ugly and random cases, tensors, tolerances."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from sparse_kernels.geometry import Conv2dGeometry
from sparse_kernels.pattern import SparsityPattern

Block = tuple[int, int]
BLOCKS: tuple[Block, ...] = ((1, 1), (2, 1), (4, 1), (8, 1), (1, 4), (3, 5), (16, 16))

#: Which blocks are stored: "random" at the case's density, none, all, or random with the first, a
#: middle and the last block row and the first block column left empty.
FILLS = ("random", "empty", "full", "empty_row")


class LinearCase(NamedTuple):
    """A linear layer: x [batch, in_features], weight [out_features, in_features] at `density`."""

    id: str
    batch: int
    in_features: int
    out_features: int
    density: float = 0.1
    block: Block = (1, 1)
    bias: bool = True
    relu: bool = False
    fill: str = "random"
    slack: int = 3  # places in the values beyond the stored blocks


class ConvCase(NamedTuple):
    """A convolution: x [batch, geometry.in_channels, height, width], weight at `density`."""

    id: str
    batch: int
    height: int
    width: int
    geometry: Conv2dGeometry
    density: float = 0.1
    block: Block = (1, 1)
    bias: bool = True
    relu: bool = False
    fill: str = "random"
    slack: int = 3


def _block_name(block: Block) -> str:
    return f"b{block[0]}x{block[1]}"


LINEAR_CASES: tuple[LinearCase, ...] = (
    LinearCase("smallest", 1, 1, 1, 1.0, slack=0),
    LinearCase("batch0", 0, 12, 8),
    LinearCase("batch1", 1, 33, 17, 0.2),
    LinearCase("batch0-blocks", 0, 12, 8, 0.5, (4, 1)),
    LinearCase("one-input", 5, 1, 9, 0.5),
    LinearCase("one-output", 5, 9, 1, 0.5),
    LinearCase("primes", 97, 101, 103, 0.07),
    LinearCase("primes-blocks", 61, 101, 103, 0.07, (8, 1)),
    LinearCase("primes-tiles", 19, 101, 103, 0.1, (16, 16)),
    LinearCase("empty", 7, 24, 18, fill="empty"),
    LinearCase("empty-blocks-relu", 7, 24, 18, block=(4, 1), relu=True, fill="empty"),
    LinearCase("full", 9, 23, 29, fill="full", slack=0),
    LinearCase("full-blocks", 9, 23, 29, block=(4, 1), fill="full", slack=0),
    LinearCase("full-odd-blocks", 9, 23, 29, block=(3, 5), fill="full"),
    LinearCase("empty-row", 13, 40, 50, 0.2, fill="empty_row"),
    LinearCase("empty-row-blocks", 13, 40, 50, 0.2, (4, 1), fill="empty_row"),
    LinearCase("no-bias", 16, 30, 20, 0.3, bias=False),
    LinearCase("relu", 16, 30, 20, 0.3, relu=True),
    LinearCase("relu-no-bias", 33, 30, 20, 0.3, (2, 1), bias=False, relu=True),
    LinearCase("wide-batch", 1031, 20, 24, 0.2),
    LinearCase("wide-batch-blocks", 515, 20, 24, 0.2, (4, 1), relu=True),
    LinearCase("lenet-fc1", 100, 784, 300, 0.05),
    LinearCase("dense-rows", 64, 512, 40, 0.9),
    LinearCase("scatter-linear", 37, 301, 70, 0.6, (4, 1)),
    LinearCase("scatter-batch1", 1, 64, 130, 0.8, (8, 1)),
    *(LinearCase(f"even-{_block_name(b)}", 32, 80, 48, 0.2, b) for b in BLOCKS),
    *(LinearCase(f"partial-{_block_name(b)}", 29, 43, 37, 0.3, b, relu=True) for b in BLOCKS[1:]),
)


def _conv(channels: tuple[int, int], kernel: Block, **fields: int) -> Conv2dGeometry:
    """Geometry of (C_in, C_out), kernel, and stride, pad, dilation for both axes or fields."""
    for short, names in (
        ("stride", ("stride_h", "stride_w")),
        ("pad", ("pad_top", "pad_left", "pad_bottom", "pad_right")),
        ("dilation", ("dilation_h", "dilation_w")),
    ):
        if short in fields:
            value = fields.pop(short)
            fields.update({name: value for name in names})
    return Conv2dGeometry(channels[1], channels[0], *kernel, **fields).validate()


_PLAIN = _conv((12, 20), (3, 3), pad=1)

CONV_CASES: tuple[ConvCase, ...] = (
    ConvCase("smallest", 1, 1, 1, _conv((1, 1), (1, 1)), 1.0, slack=0),
    ConvCase("batch0", 0, 6, 5, _PLAIN),
    ConvCase("batch0-blocks-stride", 0, 6, 5, _conv((8, 8), (3, 3), stride=2), 0.5, (4, 1)),
    ConvCase("batch1", 1, 9, 7, _PLAIN, 0.2),
    ConvCase("primes", 5, 11, 13, _conv((7, 17), (3, 5), pad=2), 0.15),
    ConvCase("primes-blocks", 19, 7, 5, _conv((7, 17), (3, 3), pad=1), 0.2, (4, 1)),
    ConvCase("empty", 3, 5, 5, _PLAIN, fill="empty"),
    ConvCase("empty-blocks-relu", 3, 5, 5, _PLAIN, block=(2, 1), relu=True, fill="empty"),
    ConvCase("full", 2, 6, 6, _conv((5, 6), (3, 3), pad=1), fill="full", slack=0),
    ConvCase("full-blocks", 2, 6, 6, _conv((5, 6), (3, 3), pad=1), block=(4, 1), fill="full"),
    ConvCase("empty-row", 4, 6, 7, _PLAIN, 0.2, fill="empty_row"),
    ConvCase("empty-row-blocks", 4, 6, 7, _PLAIN, 0.3, (4, 1), fill="empty_row"),
    ConvCase("no-bias", 4, 6, 6, _PLAIN, 0.2, bias=False),
    ConvCase("relu", 4, 6, 6, _PLAIN, 0.2, relu=True),
    ConvCase("wide-batch", 130, 4, 3, _PLAIN, 0.2, relu=True),
    ConvCase("wide-batch-blocks", 67, 4, 3, _PLAIN, 0.2, (4, 1)),
    ConvCase("pointwise", 6, 7, 5, _conv((24, 16), (1, 1)), 0.3),
    ConvCase("pointwise-stride2", 6, 7, 8, _conv((24, 16), (1, 1), stride=2), 0.3, (2, 1)),
    ConvCase("pointwise-padded", 3, 4, 4, _conv((6, 5), (1, 1), pad=1), 0.5),
    ConvCase("pointwise-flat", 16, 9, 10, _conv((24, 40), (1, 1)), 0.1, relu=True),
    ConvCase("pointwise-flat-odd", 3, 16, 13, _conv((37, 21), (1, 1)), 0.4),
    ConvCase("pointwise-flat-groups", 32, 7, 7, _conv((24, 16), (1, 1), groups=2), 0.3, (4, 1)),
    # Outputs (or their gradients) above 12 MB, which are written past the cache.
    ConvCase("pointwise-flat-streamed", 32, 28, 28, _conv((8, 130), (1, 1)), 0.1),
    ConvCase("pointwise-stride2-streamed", 32, 28, 28, _conv((130, 8), (1, 1), stride=2), 0.1),
    ConvCase("pointwise-stride2-wide", 70, 7, 9, _conv((40, 24), (1, 1), stride=2), 0.2),
    ConvCase("pointwise-stride3x1", 5, 4, 9, _conv((9, 12), (1, 1), stride_h=3), 0.3),
    ConvCase("flat-rows", 32, 9, 11, _conv((5, 12), (3, 3), pad=1), 0.1, relu=True),
    ConvCase("flat-rows-dense", 48, 6, 5, _conv((11, 12), (3, 3), pad=1), 0.5),
    ConvCase(
        "flat-rows-uneven",
        64,
        9,
        8,
        _conv((8, 6), (3, 2), dilation=2, pad_left=3, pad_bottom=1, groups=2),
        0.2,
    ),
    ConvCase("few-inputs", 33, 17, 15, _conv((3, 20), (7, 7), stride=2, pad=3), 0.05),
    ConvCase("few-inputs-blocks", 20, 9, 8, _conv((3, 20), (3, 3), pad=1), 0.1, (3, 2)),
    ConvCase("few-inputs-stride3", 32, 11, 13, _conv((4, 16), (2, 3), stride=3, pad=1), 0.2),
    ConvCase("few-inputs-groups", 9, 8, 6, _conv((4, 24), (3, 3), pad=2, groups=2), 0.1),
    ConvCase("kernel2", 4, 8, 7, _conv((6, 10), (2, 2), stride=2), 0.3),
    ConvCase("kernel1x7", 3, 5, 11, _conv((6, 8), (1, 7), pad_left=3, pad_right=3), 0.2),
    ConvCase("kernel7x1", 3, 11, 5, _conv((6, 8), (7, 1), pad_top=3, pad_bottom=3), 0.2, (2, 1)),
    ConvCase("kernel5", 3, 9, 10, _conv((6, 8), (5, 5), pad=2), 0.1),
    ConvCase("kernel7-stride2", 2, 17, 15, _conv((3, 12), (7, 7), stride=2, pad=3), 0.2, (4, 1)),
    ConvCase("kernel11-stride2", 2, 14, 13, _conv((3, 8), (11, 11), stride=2, pad=5), 0.1),
    ConvCase("kernel-is-image", 3, 4, 5, _conv((6, 9), (4, 5)), 0.3),
    ConvCase("stride3", 4, 11, 13, _conv((6, 8), (3, 3), stride=3, pad=1), 0.3),
    ConvCase("stride3-gaps", 3, 10, 11, _conv((6, 8), (2, 2), stride=3), 0.4, (2, 1)),
    ConvCase("stride2x1", 3, 9, 8, _conv((6, 8), (3, 3), stride_h=2, pad=1), 0.3),
    ConvCase("dilation2", 3, 10, 9, _conv((6, 8), (3, 3), dilation=2, pad=2), 0.3),
    ConvCase("dilation3x1-stride2", 3, 13, 9, _conv((6, 8), (3, 3), dilation_h=3, stride=2), 0.3),
    ConvCase("same-kernel4", 3, 7, 6, _conv((6, 8), (4, 4), pad=1, pad_bottom=2, pad_right=2), 0.2),
    ConvCase(
        "one-sided-pad", 3, 6, 6, _conv((6, 8), (3, 3), pad_left=2, pad_bottom=1), 0.3, (4, 1)
    ),
    ConvCase("pad-beyond-kernel", 2, 3, 4, _conv((4, 6), (3, 3), pad=4), 0.4),
    ConvCase("one-pixel", 2, 1, 1, _conv((4, 6), (3, 3), pad=1), 0.4),
    ConvCase("groups2", 3, 6, 7, _conv((12, 8), (3, 3), pad=1, groups=2), 0.3),
    ConvCase("groups3-blocks", 3, 6, 7, _conv((12, 15), (3, 3), pad=1, groups=3), 0.3, (4, 1)),
    ConvCase(
        "groups2-stride-dilation",
        2,
        11,
        9,
        _conv((4, 6), (3, 2), stride=2, dilation=2, pad=1, groups=2),
        0.5,
    ),
    ConvCase("depthwise", 3, 6, 7, _conv((10, 10), (3, 3), pad=1, groups=10), 0.4),
    ConvCase("depthwise-twice", 3, 6, 7, _conv((5, 10), (3, 3), pad=1, groups=5), 0.4, (2, 1)),
    # Tall blocks, many of one source block and tap: dgrad scatters (scatter_rows.h), in one band
    # and in two; last blocks of 3 = 2 + 1 and of 1 channels; phases that do not scatter.
    ConvCase("scatter", 19, 7, 5, _conv((48, 40), (3, 3), pad=1), 0.2, (4, 1)),
    ConvCase("scatter-partial", 35, 4, 3, _conv((40, 43), (3, 3), dilation=2, pad=2), 0.3, (8, 1)),
    ConvCase("scatter-odd", 5, 2, 2, _conv((40, 43), (3, 3), pad=1), 0.3, (7, 1)),
    ConvCase("scatter-bands", 3, 3, 3, _conv((301, 24), (3, 3), pad=1), 0.2, (4, 1)),
    ConvCase("scatter-groups", 8, 6, 5, _conv((48, 78), (3, 3), groups=2), 0.35, (8, 1)),
    ConvCase("scatter-stride2", 16, 7, 9, _conv((64, 40), (3, 3), stride=2, pad=1), 0.5, (4, 1)),
    ConvCase(
        "scatter-empty-row", 9, 3, 1, _conv((48, 64), (3, 3), pad=1), 0.3, (4, 1), fill="empty_row"
    ),
    ConvCase("vgg-like", 8, 8, 8, _conv((64, 64), (3, 3), pad=1), 0.05),
    *(
        ConvCase(f"even-{_block_name(b)}", 4, 6, 6, _conv((80, 48), (3, 3), pad=1), 0.1, b)
        for b in BLOCKS
    ),
    *(
        ConvCase(f"partial-{_block_name(b)}", 5, 5, 4, _conv((19, 37), (2, 3), pad=1), 0.2, b)
        for b in BLOCKS[1:]
    ),
    *(
        ConvCase(
            f"partial-groups-{_block_name(b)}", 3, 5, 4, _conv((34, 38), (3, 3), groups=2), 0.2, b
        )
        for b in BLOCKS[1:]
    ),
)


def _random_block(rng: random.Random, rows: int, cols: int) -> Block:
    """A block of the table that fits into a segment of rows x cols."""
    return rng.choice([block for block in BLOCKS if block[0] <= rows and block[1] <= cols])


def random_linear_cases(n: int, seed: int) -> Iterator[LinearCase]:
    """`n` valid linear cases of up to 70 features, the same for the same seed."""
    rng = random.Random(seed)
    for i in range(n):
        batch, inputs, outputs = rng.randint(0, 70), rng.randint(1, 70), rng.randint(1, 70)
        yield LinearCase(
            f"random-{seed}-{i}",
            batch,
            inputs,
            outputs,
            rng.choice((0.02, 0.1, 0.3, 0.8)),
            _random_block(rng, outputs, inputs),
            rng.random() < 0.5,
            rng.random() < 0.5,
            rng.choice(FILLS[:1] * 5 + FILLS),
            rng.randint(0, 4),
        )


def random_conv_cases(n: int, seed: int) -> Iterator[ConvCase]:
    """`n` valid convolutions of up to 24 channels per group and 12 pixels a side."""
    rng = random.Random(seed)
    for i in range(n):
        groups = rng.choice((1, 1, 1, 2, 3))
        per_group_in, per_group_out = rng.randint(1, 24), rng.randint(1, 24)
        geometry = _random_geometry(rng, groups, per_group_in, per_group_out)
        height, width = _smallest_image(geometry)
        yield ConvCase(
            f"random-{seed}-{i}",
            rng.choice((0, 1, 2, 3, 5, 17)),
            height + rng.randint(0, 8),
            width + rng.randint(0, 8),
            geometry,
            rng.choice((0.02, 0.1, 0.3, 0.8)),
            _random_block(rng, per_group_out, per_group_in),
            rng.random() < 0.5,
            rng.random() < 0.5,
            rng.choice(FILLS[:1] * 5 + FILLS),
            rng.randint(0, 4),
        )


def _smallest_image(g: Conv2dGeometry) -> tuple[int, int]:
    """The smallest height and width that give an output pixel."""
    height = g.dilation_h * (g.kernel_height - 1) + 1 - g.pad_top - g.pad_bottom
    width = g.dilation_w * (g.kernel_width - 1) + 1 - g.pad_left - g.pad_right
    return max(1, height), max(1, width)


def _random_geometry(
    rng: random.Random, groups: int, per_group_in: int, per_group_out: int
) -> Conv2dGeometry:
    return Conv2dGeometry(
        groups * per_group_out,
        groups * per_group_in,
        rng.randint(1, 5),
        rng.randint(1, 5),
        rng.randint(1, 3),
        rng.randint(1, 3),
        *(rng.randint(0, 3) for _ in range(4)),
        rng.randint(1, 3),
        rng.randint(1, 3),
        groups,
    ).validate()


def make_pattern(
    case: LinearCase | ConvCase, generator: torch.Generator | None = None
) -> SparsityPattern:
    """The pattern of a case, with `slack` spare places."""
    if isinstance(case, LinearCase):
        shape, row_parts, col_parts = (case.out_features, case.in_features), 1, 1
    else:
        shape = case.geometry.matrix_shape
        row_parts, col_parts = case.geometry.groups, case.geometry.taps
    grid = (shape, case.block, row_parts, col_parts)
    density = {"empty": 0.0, "full": 1.0}.get(case.fill, case.density)
    pattern = SparsityPattern.random(
        shape, density, None, case.block, row_parts, col_parts, generator
    )
    mask = pattern.block_mask()
    if case.fill == "empty_row":
        mask[[0, mask.shape[0] // 2, -1]] = False
        mask[:, 0] = False
    capacity = max(1, int(mask.sum()) + case.slack)
    return SparsityPattern.from_block_mask(mask, *grid, capacity)


def _randn(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator | None
) -> torch.Tensor:
    """Normal numbers around 0.25: a sum that forgets a term or a sign does not average out."""
    return (torch.randn(shape, dtype=torch.float64, generator=generator) + 0.25).to(dtype)


def _weight_tensors(
    case: LinearCase | ConvCase, dtype: torch.dtype, generator: torch.Generator | None
) -> dict[str, Any]:
    pattern = make_pattern(case, generator)
    matrix = _randn(pattern.shape, dtype, generator) * pattern.mask()
    bias = _randn((pattern.shape[0],), dtype, generator) if case.bias else None
    return {
        "pattern": pattern,
        "indices": pattern.tensors(),
        "values": pattern.compress(matrix),
        "matrix": matrix,
        "bias": bias,
    }


def make_linear(
    case: LinearCase, dtype: torch.dtype, generator: torch.Generator | None = None
) -> dict[str, Any]:
    """Tensors of a case: pattern, indices (five tensors), values [capacity, bh, bw], matrix [out,
    in] (the masked dense weight), bias [out] or None, x [batch, in], grad [batch, out].
    Contiguous, CPU.
    """
    return {
        **_weight_tensors(case, dtype, generator),
        "x": _randn((case.batch, case.in_features), dtype, generator),
        "grad": _randn((case.batch, case.out_features), dtype, generator),
    }


def make_conv(
    case: ConvCase, dtype: torch.dtype, generator: torch.Generator | None = None
) -> dict[str, Any]:
    """As make_linear, with x [N, C_in, H, W], grad [N, C_out, H', W'], geometry (list of 13
    integers) and weight [C_out, C_in/groups, kh, kw] beside the same weight as matrix.
    """
    g = case.geometry
    tensors = _weight_tensors(case, dtype, generator)
    taps_first = tensors["matrix"].view(g.out_channels, g.kernel_height, g.kernel_width, -1)
    out_h, out_w = g.output_size(case.height, case.width)
    return {
        **tensors,
        "weight": taps_first.permute(0, 3, 1, 2).contiguous(),
        "geometry": list(g),
        "x": _randn((case.batch, g.in_channels, case.height, case.width), dtype, generator),
        "grad": _randn((case.batch, g.out_channels, out_h, out_w), dtype, generator),
    }


def relative_error(out: torch.Tensor, ref: torch.Tensor) -> float:
    """Frobenius norm of out - ref over that of ref; inf if `out` is not finite or ref is 0."""
    if out.shape != ref.shape:
        raise ValueError(f"expected shape {tuple(ref.shape)}, got {tuple(out.shape)}")
    wide, exact = out.detach().double().cpu(), ref.detach().double().cpu()
    if not bool(torch.isfinite(exact).all()):
        raise ValueError("the reference is not finite; the comparison would mean nothing")
    if not bool(torch.isfinite(wide).all()):
        return float("inf")
    error, scale = float((wide - exact).norm()), float(exact.norm())
    if error == 0.0:
        return 0.0
    return error / scale if scale > 0 else float("inf")


def tolerance(dtype: torch.dtype, reduction_length: int) -> float:
    """Bound on relative_error for sums of `reduction_length` products against a float64 reference.

    Rounding errors within a sum are nearly independent, so they grow with the root of its length;
    half types accumulate in float32 and are rounded once on the way out.
    """
    accumulate = torch.promote_types(dtype, torch.float32)
    sums = 4 * torch.finfo(accumulate).eps * max(reduction_length, 1) ** 0.5
    rounding = torch.finfo(dtype).eps if dtype != accumulate else 0.0
    return sums + rounding
