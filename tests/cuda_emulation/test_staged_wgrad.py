"""The weight gradient with both operands staged in shared memory, under emulation, against the
float64 reference.
"""

from __future__ import annotations

import functools

import pytest
import torch
from cases import ConvCase, LinearCase, _conv, relative_error
from emulator import address, load, nan_like, registered
from problems import DTYPES, Case, Problem, bound, expected, feature_major, make, misaligned

from sparse_kernels.backends import _cuda_native, _cuda_variants, cuda

DIRECT, STAGED = 1, 2  # csrc/kernels_cuda.h's Variant
# A thread block has 96 rows of grad and 96 columns, 64 points at a time, 512 sums in one pass.
CASES: tuple[Case, ...] = (
    LinearCase("primes", 37, 101, 103, 0.2),  # two by two thread blocks, one tile of 64 points
    LinearCase("several-passes", 12, 97, 90, 0.8),  # 7000 entries, 512 at a time
    LinearCase("empty", 20, 30, 40, 0.0),
    LinearCase("parts", 4200, 7, 5, 0.5),  # a last part and a last tile that are short
    LinearCase("batch1", 1, 40, 30, 0.3),
    LinearCase("batch0", 0, 20, 30, 0.3),
    *(LinearCase(f"b{v}", 70, 100, 3 * v + 91, 0.15, (v, 1)) for v in (2, 3, 4, 8, 13, 16, 32)),
    LinearCase("b32-several-passes", 9, 50, 97, 0.9, (32, 1)),
    ConvCase("conv", 5, 6, 7, _conv((13, 9), (3, 3), pad=1), 0.3),
    ConvCase("conv-stride", 8, 9, 5, _conv((11, 6), (3, 2), stride=2, pad=1), 0.5, (4, 1)),
    ConvCase(
        "conv-b16-dilation", 16, 5, 4, _conv((3, 40), (3, 3), pad=2, dilation=2), 0.3, (16, 1)
    ),
)
EVEN = {"parts", "several-passes", "empty", "conv-stride", "conv-b16-dilation", "batch0"}
EVEN |= {case.id for case in CASES if case.batch == 70}


def compute(p: Problem, variant: int = STAGED, seed: int = 0, shifted: str = "") -> torch.Tensor:
    """dvalues of the emulated kernel; shifted: the operand that begins at an odd address."""
    t, bh = p.t, p.case.block[0]
    operands = {"grad": feature_major(t["grad"]), "x": feature_major(t["x"])}
    if shifted:
        operands[shifted] = misaligned(operands[shifted])
    size = load().cuda_wgrad_workspace(p.geometry, bh, len(t["values"]), variant)
    tensors = {"out_dvalues": nan_like(t["values"].shape), **operands}
    tensors |= {"crow": t["indices"][0], "col": t["indices"][1]}
    tensors |= {"out_workspace": nan_like((size // 4,))}
    rest = (size, p.geometry, bh, len(t["values"]), DTYPES.index(p.dtype), 0, 0, variant)
    with registered(seed, **tensors) as e:
        e.cuda_wgrad("wgrad", *map(address, tensors.values()), *rest)
    return tensors["out_dvalues"]


def close(p: Problem, got: torch.Tensor) -> None:
    want = expected(p, "wgrad")
    if float(want.norm()) == 0.0:
        assert torch.equal(got.double(), torch.zeros_like(want))
        return
    error, limit = relative_error(got, want), bound(p, "wgrad")
    assert error <= limit, f"error {error:.2e}, bound {limit:.2e}"


# 16-bit rows are copied 4 bytes at a time at least: even batches.
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(c, d) for c in CASES for d in DTYPES if d == torch.float32 or c.id in EVEN],
    ids=lambda v: getattr(v, "id", str(v).removeprefix("torch.")),
)
def test_staged_wgrad_matches_float64(case: Case, dtype: torch.dtype) -> None:
    p = make(case, dtype)
    close(p, compute(p))


def find(name: str) -> Problem:
    return make(next(case for case in CASES if case.id == name), torch.float32)


@pytest.mark.parametrize("shifted", ["grad", "x"])
def test_misaligned_operands_are_copied_four_bytes_at_a_time(shifted: str) -> None:
    p = find("conv-stride")  # float32
    close(p, compute(p, shifted=shifted))


def test_results_do_not_depend_on_the_order_of_warps() -> None:
    p = find("b3")  # float32
    first = compute(p, seed=1)
    for seed in (2, 3):
        assert torch.equal(first, compute(p, seed=seed))


def test_rows_below_a_partial_block_are_zero_whatever_x_holds() -> None:
    p = find("b16")  # float32
    clean = compute(p)
    crow, col = p.t["indices"][:2]
    last, rows = slice(int(crow[-2]), int(crow[-1])), p.case.out_features % 16
    column = int(col[last][0])  # one that the partial block row reads
    p.t["x"][3, column] = float("inf")
    found = compute(p)
    assert rows > 0 and not bool(found[last, rows:].any())
    assert bool(found[last.start, :rows].isinf().all())
    others = col[: last.stop] != column
    assert torch.equal(found[: last.stop][others], clean[: last.stop][others])


def test_direct_on_few_points_is_not_the_small_kernel() -> None:
    p = find("batch1")  # float32
    close(p, compute(p, DIRECT))


@pytest.mark.parametrize("name", ["b4", "conv-stride"])
def test_the_backend_takes_the_name_of_a_variant(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, module = find(name), load()
    monkeypatch.setattr(_cuda_native, "native", lambda: module)
    monkeypatch.setattr(_cuda_native, "place", lambda x: (0, 0))
    module.forget_memory()
    module.set_strict(False)
    try:
        operands = (p.t["grad"], p.t["x"], *p.t["indices"], *p.case.block)
        if isinstance(p.case, LinearCase):
            run = functools.partial(cuda.linear_wgrad, *operands)
        else:
            run = functools.partial(cuda.conv2d_wgrad, *operands, p.case.geometry)
        close(p, run(variant="staged"))
        close(p, run(variant="direct"))
        assert torch.equal(run(variant="direct"), run())
        monkeypatch.setattr(_cuda_variants, "default", lambda site: "staged")  # as if timed
        _cuda_variants.clear()
        assert torch.equal(run(variant="staged"), run())
        with pytest.raises(
            ValueError, match="wgrad: expected a variant of staged, direct .*'fast'"
        ):
            run(variant="fast")
    finally:
        module.set_strict(True)
        monkeypatch.undo()
        _cuda_variants.clear()


def test_what_it_does_not_serve_is_refused() -> None:
    grouped = ConvCase("groups", 4, 4, 4, _conv((4, 6), (3, 3), pad=1, groups=2), 0.5)
    with pytest.raises(ValueError, match=r"^wgrad \(rows 6, .*expected one group, and a batch and"):
        compute(make(grouped, torch.float32))
    odd = LinearCase("odd", 7, 20, 30, 0.3)
    with pytest.raises(ValueError, match="multiples of 4 bytes for the staged kernel"):
        compute(make(odd, torch.bfloat16))
    with pytest.raises(ValueError, match="at most 16 pixels x batch for the small-batch"):
        compute(find("primes"), 3)
    with pytest.raises(ValueError, match="variant must be 0 .*got 4"):
        load().cuda_wgrad_workspace([3, 4, 5], 1, 2, 4)
