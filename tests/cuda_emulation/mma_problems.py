"""Cases of the tensor-core block kernels: a layer, its tensors in batch-major or channels_last
layout, and one call of each kernel through the project's own bindings.
"""

from __future__ import annotations

import problems
import torch
from cases import ConvCase, LinearCase, _conv, tolerance
from emulator import address, nan_like, registered
from problems import DTYPES, Case, Problem, compare

KERNELS = ("block_product", "block_dgrad", "block_wgrad")
TF32_EPS = 2.0**-10

# Batches of 1, of one tile of 32 points, of several of 128 and of no whole one; channels that are
# multiples of the block, of 16 bytes only, and of nothing; rows of none, one and many blocks.
LINEAR = tuple(
    case
    for b in (16, 32)
    for case in (
        LinearCase(f"b{b}-batch1", 1, 4 * b, 2 * b, 0.6, (b, b)),
        LinearCase(f"b{b}-even", 32, 5 * b, 3 * b, 0.5, (b, b), relu=True),
        LinearCase(f"b{b}-primes", 67, 101, 83, 0.4, (b, b)),
        LinearCase(f"b{b}-narrow", 131, 3 * b + 8, 2 * b + 24, 0.7, (b, b), bias=False),
        LinearCase(f"b{b}-wide-rows", 129, 13 * b, b, 1.0, (b, b), fill="full", slack=0),
        LinearCase(f"b{b}-empty-row", 35, 5 * b, 5 * b, 0.4, (b, b), fill="empty_row"),
        LinearCase(f"b{b}-empty", 9, 2 * b, 2 * b, block=(b, b), fill="empty", relu=True),
        LinearCase(f"b{b}-smallest", 3, b, b, 1.0, (b, b), slack=0),
        LinearCase(f"b{b}-batch0", 0, 2 * b, 2 * b, 0.5, (b, b)),
        LinearCase(f"b{b}-parts", 601, 2 * b, b + 5, 0.6, (b, b), slack=20),
        LinearCase(f"b{b}-long-tail", 40, b, 2 * b, 1.0, (b, b), slack=37),
    )
)
CONV = tuple(
    case
    for b in (16, 32)
    for case in (
        ConvCase(f"b{b}-conv3x3", 2, 9, 8, _conv((2 * b, 2 * b), (3, 3), pad=1), 0.3, (b, b)),
        ConvCase(
            f"b{b}-conv-stride2", 2, 7, 9, _conv((2 * b, b), (3, 3), stride=2, pad=1), 0.5, (b, b)
        ),
        ConvCase(
            f"b{b}-conv-groups", 3, 5, 6, _conv((4 * b, 2 * b + 16), (3, 2), pad=1, groups=2), 0.4,
            (b, b), relu=True,
        ),
        ConvCase(f"b{b}-conv-partial", 3, 5, 4, _conv((b + 3, b + 21), (2, 3), pad=1), 0.7, (b, b)),
        ConvCase(
            f"b{b}-conv-gaps", 1, 11, 10, _conv((b, b), (2, 2), stride=3, pad_left=2), 0.8, (b, b)
        ),
        ConvCase(
            f"b{b}-conv-dilated", 1, 8, 9, _conv((b, 2 * b), (3, 3), dilation=2, pad=2), 0.5, (b, b)
        ),
        ConvCase(
            f"b{b}-conv-stride2x3", 1, 8, 11,
            _conv((b, b), (3, 3), stride_h=2, stride_w=3, pad=4, dilation=2), 0.6, (b, b),
        ),
        ConvCase(f"b{b}-pointwise", 5, 6, 5, _conv((3 * b, 2 * b), (1, 1)), 0.5, (b, b)),
        ConvCase(f"b{b}-conv-parts", 8, 9, 9, _conv((b, b), (3, 3), pad=1), 0.4, (b, b)),
    )
)  # fmt: skip
CASES: tuple[Case, ...] = (*LINEAR, *CONV)
# One of each kind: the CI's minutes.
SMALL_KINDS = {
    "batch1", "even", "primes", "narrow", "wide-rows", "empty-row", "empty", "parts", "long-tail",
    "conv3x3", "conv-stride2", "conv-groups", "conv-partial",
}  # fmt: skip


def is_small(case: Case) -> bool:
    return case.id.partition("-")[2] in SMALL_KINDS


def make(case: Case, dtype: torch.dtype) -> Problem:
    """As problems.make, with values in the dtype of the activations."""
    p = problems.make(case, dtype)
    p.t["values"] = p.t["values"].to(dtype)
    if case.relu:  # sums are longer here
        p.t["bias"] = 8 * p.t["bias"]
    return p


def expected(p: Problem, kernel: str) -> torch.Tensor:
    """The float64 reference's answer."""
    return problems.expected(p, kernel.removeprefix("block_"))


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] as memory [N, H, W, C]; [N, F] as it is."""
    return x.movedim(1, -1).contiguous()


def outside_as_nan(p: Problem) -> torch.Tensor:
    """The values as kernels get them: NaN wherever they must not be read."""
    pattern, t = p.t["pattern"], p.t
    values: torch.Tensor = t["values"].clone().contiguous()
    there = pattern.compress(torch.ones(pattern.shape))
    values[there == 0] = float("nan")
    values[int(t["indices"][0][-1]) :] = float("nan")
    return values


def compute(p: Problem, kernel: str, seed: int = 0, device: int = 0) -> torch.Tensor:
    """The kernel's answer, in the reference's order of dimensions."""
    t, block, element = p.t, p.case.block[0], DTYPES.index(p.dtype)
    crow, col, t_crow, t_row, t_perm = t["indices"]
    x, grad, bias = channels_last(t["x"]), channels_last(t["grad"]), t["bias"]
    values = outside_as_nan(p)
    if kernel == "block_product":
        y = nan_like(grad.shape, p.dtype)
        with registered(seed, out_y=y, x=x, values=values, bias=bias, crow=crow, col=col) as e:
            tensors = map(address, (y, x, values, bias, crow, col))
            e.cuda_block_product(
                kernel, *tensors, p.geometry, block, p.case.relu, element, device, 0
            )
        return y.movedim(-1, 1)
    if kernel == "block_dgrad":
        dx = nan_like(x.shape, p.dtype)
        transposed = {"t_crow": t_crow, "t_row": t_row, "t_perm": t_perm}
        with registered(seed, out_dx=dx, grad=grad, values=values, **transposed) as e:
            tensors = map(address, (dx, grad, values, t_crow, t_row, t_perm))
            e.cuda_block_dgrad(kernel, *tensors, p.geometry, block, element, device, 0)
        return dx.movedim(-1, 1)
    return _wgrad(p, x, grad, seed, device)


def _wgrad(p: Problem, x: torch.Tensor, grad: torch.Tensor, seed: int, device: int) -> torch.Tensor:
    crow, col = p.t["indices"][:2]
    block, capacity, element = p.case.block[0], len(p.t["values"]), DTYPES.index(p.dtype)
    dvalues = nan_like(p.t["values"].shape)
    with registered(seed) as e:
        size = e.cuda_block_wgrad_workspace(p.geometry, block, capacity, element)
    workspace = nan_like((size // 4,))
    tensors = {"grad": grad, "x": x, "crow": crow, "col": col, "out_workspace": workspace}
    with registered(seed, out_dvalues=dvalues, **tensors) as e:
        places = [address(tensor) for tensor in (dvalues, *tensors.values())]
        e.cuda_block_wgrad(
            "block_wgrad", *places, size, p.geometry, block, capacity, element, device, 0
        )
    return dvalues


def bound(p: Problem, kernel: str) -> float:
    """Tolerance of the relative error: by dtype and length of the longest sum; in TF32 both
    factors of a product are rounded once.
    """
    rows, cols = p.t["matrix"].shape
    points = p.t["grad"].numel() // max(rows, 1)
    taps = 1 if isinstance(p.case, LinearCase) else p.case.geometry.taps
    length = {"block_product": cols, "block_dgrad": rows * taps, "block_wgrad": points}[kernel]
    limit = tolerance(torch.float32 if kernel == "block_wgrad" else p.dtype, length)
    return limit + (TF32_EPS if p.dtype == torch.float32 else 0.0)


def check(case: Case, dtype: torch.dtype, kernel: str, seed: int = 0) -> float:
    """Relative error of one case; AssertionError with the numbers if it is above the bound."""
    p = make(case, dtype)
    got, want = compute(p, kernel, seed), expected(p, kernel)
    assert got.shape == want.shape
    if kernel == "block_wgrad":  # exact zeros outside of partial blocks and past the stored ones
        there = p.t["pattern"].compress(torch.ones(p.t["pattern"].shape))
        there[int(p.t["indices"][0][-1]) :] = 0
        assert not bool(got[there == 0].any()), (case.id, "not zero outside of the pattern")
    return compare(f"{kernel} {case.id} {dtype}", got, want, bound(p, kernel))
