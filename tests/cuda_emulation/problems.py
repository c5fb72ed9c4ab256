"""Cases of the CUDA kernels: a layer, its tensors in feature-major layout, and one call of each
kernel through the project's own bindings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from cases import (
    CONV_CASES,
    LINEAR_CASES,
    ConvCase,
    LinearCase,
    _conv,
    make_conv,
    make_linear,
    random_conv_cases,
    random_linear_cases,
    relative_error,
    tolerance,
)
from emulator import address, load, nan_like, registered

from sparse_kernels.backends import _cuda_variants, reference

Case = LinearCase | ConvCase
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNELS = ("product", "staged", "small", "dgrad", "staged_dgrad", "wgrad")

# In the order of csrc/kernels_cuda.h's Variant.
VARIANTS = ("chosen", "product", "staged", "small")
# Of the input gradient, likewise; "dgrad" is what the launcher chooses.
DGRAD_VARIANTS = ("dgrad", "direct_dgrad", "staged_dgrad", "small_dgrad")

# Beside the shared table: every height that has a kernel of its own, heights between, batches that
# take the wide and the narrow loads, sums in several parts, strides and groups with tall blocks.
EXTRA: tuple[Case, ...] = (
    *(
        LinearCase(f"b{v}-batch{n}", n, 37, 2 * v + 5, 0.3, (v, 1), relu=n == 33)
        for v in (1, 2, 3, 4, 8, 13, 16, 32)
        for n in (33, 132)
    ),
    # At most 16 points: the kernels of small batches.
    *(
        LinearCase(f"small-b{v}-batch{n}", n, 141, 5 * v + 3, 0.3, (v, 1), relu=n == 8)
        for v, n in (
            *((1, n) for n in (1, 2, 3, 4, 7, 8, 9, 16)),
            (2, 1),
            (2, 5),
            (3, 4),
            (4, 2),
            (4, 16),
            (8, 1),
            (8, 13),
            (13, 8),
            (16, 1),
            (16, 4),
            (32, 1),
            (32, 2),
            (32, 9),
            (32, 16),
        )
    ),
    ConvCase("small-conv", 1, 4, 4, _conv((6, 9), (3, 3), pad=1), 0.4, relu=True),
    ConvCase("small-conv-b4-groups", 3, 2, 2, _conv((6, 22), (3, 3), pad=1, groups=2), 0.4, (4, 1)),
    ConvCase(
        "small-conv-b32-stride", 2, 3, 3, _conv((5, 70), (3, 2), stride=2, pad=1), 0.3, (32, 1)
    ),
    LinearCase("even-wide-32", 70, 40, 64, 0.3, (32, 1)),
    LinearCase("long-rows", 136, 200, 3, 0.9),
    LinearCase("staged-wide", 136, 300, 150, 0.2, relu=True),
    LinearCase("staged-dense", 64, 517, 9, 0.95),
    LinearCase("staged-b5", 72, 260, 43, 0.3, (5, 1)),
    LinearCase("staged-b16", 8, 131, 300, 0.2, (16, 1)),
    LinearCase("staged-b32", 72, 60, 140, 0.2, (32, 1)),
    LinearCase("staged-empty-rows", 72, 270, 140, 0.003),
    ConvCase("staged-conv-1x1", 8, 5, 7, _conv((150, 141), (1, 1)), 0.1, relu=True),
    ConvCase("staged-conv-3x3", 8, 6, 5, _conv((19, 35), (3, 3), pad=1), 0.2, relu=True),
    ConvCase("staged-conv-b4-3x2", 16, 5, 4, _conv((33, 45), (3, 2), pad=1), 0.2, (4, 1)),
    ConvCase(
        "staged-conv-b13-dilated", 8, 9, 7, _conv((11, 29), (3, 3), pad=3, dilation=2), 0.3, (13, 1)
    ),
    ConvCase("staged-conv-stride", 8, 9, 7, _conv((12, 19), (3, 3), stride=2, pad=1), 0.3),
    # Odd batches: lanes move single elements in steps of 32.
    *(
        LinearCase(f"odd-b{v}-batch{n}", n, 37, 2 * v + 5, 0.3, (v, 1), relu=n == 131)
        for v, n in ((1, 131), (1, 258), (2, 129), (3, 161), (4, 70), (8, 133), (16, 99), (32, 67))
    ),
    ConvCase("odd-conv", 7, 5, 6, _conv((6, 9), (3, 3), pad=1), 0.3, relu=True),
    ConvCase(
        "odd-conv-b4-stride-groups",
        13,
        7,
        5,
        _conv((6, 22), (3, 2), stride=2, pad=1, groups=2),
        0.4,
        (4, 1),
    ),
    LinearCase("parts", 4500, 9, 6, 0.4),
    LinearCase("parts-b4", 4100, 6, 9, 0.5, (4, 1)),
    ConvCase("conv-parts", 33, 9, 8, _conv((5, 6), (3, 3), pad=1), 0.2),
    *(
        ConvCase(
            f"conv-b{v}-stride-groups",
            8,
            7,
            5,
            _conv((6, 2 * (v + 3)), (3, 2), stride=2, pad=1, groups=2),
            0.3,
            (v, 1),
        )
        for v in (2, 5, 8, 16, 32)
    ),
    ConvCase("conv-wide", 132, 3, 2, _conv((6, 9), (3, 3), pad=2, dilation=2), 0.3, relu=True),
)
# Shapes that only matter to the CPU's caches, or are too big for a warp at a time by hand.
TOO_BIG = {"pointwise-flat-streamed", "pointwise-stride2-streamed", "vgg-like"}
# One of each kind: the CI's minutes. All of them: `make test-full`.
SMALL = {
    "smallest", "batch0", "batch1", "primes", "primes-blocks", "empty", "full-blocks",
    "empty-row-blocks", "no-bias", "relu", "b1-batch132", "b3-batch33", "b4-batch132",
    "b16-batch33", "b32-batch132", "parts", "long-rows", "conv-parts", "dilation3x1-stride2",
    "one-sided-pad", "groups3-blocks", "depthwise-twice", "conv-b8-stride-groups", "conv-wide",
    "staged-wide", "staged-b5", "staged-b16", "even-wide-32",
    "conv-b32-stride-groups", "stride3-gaps", "pad-beyond-kernel", "even-b8x1",
    "small-b1-batch1", "small-b1-batch9", "small-b1-batch16", "small-b4-batch2", "small-b13-batch8",
    "small-b32-batch1", "small-b32-batch9", "small-conv", "small-conv-b4-groups",
    "small-conv-b32-stride", "staged-b32", "staged-conv-1x1", "staged-conv-3x3",
    "staged-conv-b13-dilated", "odd-b1-batch131", "odd-b4-batch70", "odd-b32-batch67", "odd-conv",
    "odd-conv-b4-stride-groups",
}  # fmt: skip


def served(case: Case) -> bool:
    return case.block[1] == 1 and case.block[0] <= 32 and case.id not in TOO_BIG


def all_cases() -> list[Case]:
    table = [*LINEAR_CASES, *CONV_CASES, *EXTRA]
    table += [*random_linear_cases(40, 11), *random_conv_cases(60, 12)]
    return [case for case in table if served(case)]


def small_cases() -> list[Case]:
    return [case for case in all_cases() if case.id in SMALL]


def feature_major(x: torch.Tensor) -> torch.Tensor:
    """[N, ...] as memory [..., N]."""
    return x.movedim(0, -1).contiguous()


class Problem(NamedTuple):
    """Tensors of a case in one dtype, and what float64 makes of them."""

    case: Case
    dtype: torch.dtype
    t: dict[str, Any]
    geometry: list[int]


def make(case: Case, dtype: torch.dtype) -> Problem:
    generator = torch.Generator().manual_seed(len(case.id) + case.batch)
    if isinstance(case, LinearCase):
        t = make_linear(case, torch.float32, generator)
        geometry = [case.out_features, case.in_features, case.batch]
    else:
        t = make_conv(case, torch.float32, generator)
        out_h, out_w = case.geometry.output_size(case.height, case.width)
        geometry = [case.batch, case.height, case.width, out_h, out_w, *case.geometry]
    if case.relu:  # away from the kink: a rounded sum may fall on either side of it
        t["bias"] = torch.full((t["matrix"].shape[0],), 0.5)
        t["bias"][::2] = -0.5
    for name in ("x", "grad"):
        t[name] = t[name].to(dtype)
    # What lies past the stored blocks is never read.
    t["values"][int(t["indices"][0][-1]) :] = float("nan")
    return Problem(case, dtype, t, geometry)


def expected(p: Problem, kernel: str) -> torch.Tensor:
    """The float64 reference's answer."""
    t, case = p.t, p.case
    x, grad = t["x"].double(), t["grad"].double()
    values = torch.nan_to_num(t["values"].double())
    bias = None if t["bias"] is None else t["bias"].double()
    indices, linear = t["indices"], isinstance(case, LinearCase)
    if kernel in ("product", "staged", "small"):
        if linear:
            return reference.linear(x, values, *indices, bias, case.out_features, case.relu)
        return reference.conv2d(x, values, *indices, bias, case.geometry, case.relu)
    if kernel in DGRAD_VARIANTS:
        if linear:
            return reference.linear_dgrad(grad, values, *indices, case.in_features)
        size = (case.height, case.width)
        return reference.conv2d_dgrad(grad, values, *indices, *size, case.geometry)
    if linear:
        return reference.linear_wgrad(grad, x, *indices, *case.block)
    return reference.conv2d_wgrad(grad, x, *indices, *case.block, case.geometry)


class Call(NamedTuple):
    """A call of the bindings: function, tensors in the order of its arguments (those named out_...
    are written, the first is the answer), the arguments after them, of which the stream is the
    last, the variant of input gradients, and the order of rows, which comes last if there is one.
    """

    function: str
    tensors: dict[str, torch.Tensor | None]
    rest: tuple[Any, ...]
    variant: tuple[int, ...] = ()
    order: torch.Tensor | None = None


def by_length(p: Problem, kernel: str) -> torch.Tensor | None:
    """Rows (for an input gradient: channels) by falling length, as the backend makes it; every
    second case goes without.
    """
    if len(p.case.id) % 2 or kernel not in (*VARIANTS, *DGRAD_VARIANTS):
        return None
    crow, _, t_crow, _, _ = p.t["indices"]
    if kernel in VARIANTS:
        return _cuda_variants.rows_by_length(crow)
    groups = 1 if isinstance(p.case, LinearCase) else p.case.geometry.groups
    return _cuda_variants.channels_by_length(t_crow, p.t["x"].shape[1], groups)


def describe(p: Problem, kernel: str, workspace: Callable[..., int], device: int = 0) -> Call:
    """The call that computes a problem; workspace: cuda_wgrad_workspace."""
    t, bh, element = p.t, p.case.block[0], DTYPES.index(p.dtype)
    crow, col, t_crow, t_row, t_perm = t["indices"]
    x, grad = feature_major(t["x"]), feature_major(t["grad"])
    values, bias = t["values"].contiguous(), t["bias"]
    tensors: dict[str, torch.Tensor | None]
    if kernel in VARIANTS:
        tensors = {"out_y": nan_like(grad.shape, p.dtype), "x": x, "values": values, "bias": bias}
        rest = (p.geometry, bh, p.case.relu, VARIANTS.index(kernel), element, device, 0)
        tensors |= {"crow": crow, "col": col}
        return Call("cuda_product", tensors, rest, order=by_length(p, kernel))
    if kernel in DGRAD_VARIANTS:
        tensors = {"out_dx": nan_like(x.shape, p.dtype), "grad": grad, "values": values}
        tensors |= {"t_crow": t_crow, "t_row": t_row, "t_perm": t_perm}
        rest = (p.geometry, bh, element, device, 0)
        variant = (DGRAD_VARIANTS.index(kernel),)
        return Call("cuda_dgrad", tensors, rest, variant, by_length(p, kernel))
    size = workspace(p.geometry, bh, len(values))
    tensors = {"out_dvalues": nan_like(values.shape), "grad": grad, "x": x, "crow": crow}
    tensors |= {"col": col, "out_workspace": nan_like((size // 4,))}
    return Call("cuda_wgrad", tensors, (size, p.geometry, bh, len(values), element, device, 0))


def answer(call: Call) -> torch.Tensor:
    """What a call wrote, in the reference's order of dimensions."""
    (name, tensor), *_ = call.tensors.items()
    assert tensor is not None
    return tensor if name == "out_dvalues" else tensor.movedim(-1, 0)


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that begins one element past an aligned address."""
    held = tensor.new_empty(tensor.numel() + 1)
    assert held.data_ptr() % 16 == 0
    return held[1:].view(tensor.shape).copy_(tensor)


def compute(
    p: Problem, kernel: str, seed: int = 0, device: int = 0, shifted: str = ""
) -> torch.Tensor:
    """The emulated kernel's answer; shifted: the tensor that is misaligned."""
    call = describe(p, kernel, load().cuda_wgrad_workspace, device)
    if shifted:
        held = call.tensors[shifted]
        assert held is not None
        call.tensors[shifted] = misaligned(held)
    return run(call, kernel, seed)


def run(call: Call, name: str, seed: int = 0) -> torch.Tensor:
    """What the emulated kernel makes of a call; ``name`` is that for errors."""
    last = (*call.variant, *(() if call.order is None else (address(call.order),)))
    with registered(seed, **call.tensors, order=call.order) as e:
        getattr(e, call.function)(name, *map(address, call.tensors.values()), *call.rest, *last)
    return answer(call)


def bound(p: Problem, kernel: str) -> float:
    """Tolerance of the relative error: by dtype and length of the longest sum."""
    rows, cols = p.t["matrix"].shape
    points = p.t["grad"].numel() // max(rows, 1)
    taps = 1 if isinstance(p.case, LinearCase) else p.case.geometry.taps
    if kernel in DGRAD_VARIANTS:
        length = rows * taps
    else:
        length = points if kernel == "wgrad" else cols
    return tolerance(torch.float32 if kernel == "wgrad" else p.dtype, length)


def has(case: Case, dtype: torch.dtype, kernel: str) -> bool:
    """Whether the kernel serves the case: the staged ones want one group and whole copies, the
    forward blocks of at most 16 rows, the input gradient strides of 1; the small one at most 16
    points.
    """
    if kernel == "small":
        if isinstance(case, LinearCase):
            return case.batch <= 16
        out_h, out_w = case.geometry.output_size(case.height, case.width)
        return bool(case.batch * out_h * out_w <= 16)
    if not kernel.startswith("staged"):
        return True
    geometry = None if isinstance(case, LinearCase) else case.geometry
    whole = case.batch % (4 if dtype == torch.float32 else 8) == 0
    one_group = geometry is None or geometry.groups == 1
    strides = 1 if geometry is None else geometry.stride_h * geometry.stride_w
    fits = case.block[0] <= 16 if kernel == "staged" else strides == 1
    return whole and one_group and fits


def check(
    case: Case, dtype: torch.dtype, kernel: str, compute: Callable[..., torch.Tensor] = compute
) -> float:
    """Relative error of one case; AssertionError with the numbers if it is above the bound."""
    p = make(case, dtype)
    got, want = compute(p, kernel), expected(p, kernel)
    if want.numel() == 0:
        assert got.shape == want.shape
        return 0.0
    if float(want.norm()) == 0.0:
        assert torch.equal(got.double(), torch.zeros_like(want)), (case.id, kernel)
        return 0.0
    error, limit = relative_error(got, want), bound(p, kernel)
    assert error <= limit, f"{kernel} {case.id} {dtype}: error {error:.2e}, bound {limit:.2e}"
    return error
