"""TF32 fragments of mma.sync against an independent description, and what the emulator finds of
ldmatrix and mma.sync used wrongly.

The emulator computes by layouts that are data (include/cuda/mma_layouts.h), taken from CuTe. The
formulas below, row and column by lane and value, are those of the PTX ISA manual's "Matrix
Fragments for mma.m16n8k8" as the author remembers them. Where the package nvidia-cutlass is
installed, the data are compared with its headers: that is the independent source.
"""

from __future__ import annotations

import os

import pytest
import torch
from emulator import address, load, nan_like, registered
from test_fragments import _layout, _package, offset

ASAN = os.environ.get("SPARSE_KERNELS_EMULATION") == "asan"


def ptx_a(lane: int, i: int) -> tuple[int, int]:
    """(row, column) of A: groupID for a0 and a2, groupID + 8 for a1 and a3; columns from a2 + 4."""
    return lane // 4 + (8 if i in (1, 3) else 0), lane % 4 + (4 if i >= 2 else 0)


def ptx_b(lane: int, i: int) -> tuple[int, int]:
    """(row, column) of B: row threadID_in_group for b0, + 4 for b1; column groupID."""
    return lane % 4 + 4 * i, lane // 4


def ptx_c(lane: int, i: int) -> tuple[int, int]:
    """(row, column) of C and D: groupID for c0 and c1, + 8 for c2 and c3; columns in pairs."""
    return lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + i % 2


def table(place, values: int, columns: int) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Offsets [32, values] into a row-major matrix."""
    found = [
        [row * columns + column for row, column in (place(lane, i) for i in range(values))]
        for lane in range(32)
    ]
    return torch.tensor(found, dtype=torch.int32)


def test_tf32_product() -> None:
    a, b = torch.randn(16, 8), torch.randn(8, 8)
    d = nan_like((16, 8))
    tables = {"at_a": table(ptx_a, 4, 8), "at_b": table(ptx_b, 2, 8), "at_d": table(ptx_c, 4, 8)}
    with registered(a=a, b=b, out_d=d, **tables) as emulated:
        emulated.run_mma_tf32(*map(address, (d, a, b, *tables.values())))
    torch.testing.assert_close(d, tf32(a) @ tf32(b), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(d, a @ b, rtol=1e-6, atol=1e-6)  # it was rounded


def tf32(x: torch.Tensor) -> torch.Tensor:
    """Rounded to 10 bits behind the point; no number of a test lies between two."""
    return (x.view(torch.int32).add(0x1000) & ~0x1FFF).view(torch.float32)


def test_the_data_say_what_the_manual_says() -> None:
    layouts = load().tf32_layouts
    places = {"A": (ptx_a, 4, 16), "B": (ptx_b, 2, 8), "C": (ptx_c, 4, 16)}
    for name, (place, values, rows) in places.items():
        of_lane, of_value = layouts[name]
        for lane in range(32):
            for i in range(values):
                row, column = place(lane, i)
                # CuTe indexes B by n + 8 k, and n is its column.
                first, second = (column, row) if name == "B" else (row, column)
                assert offset(lane, of_lane) + offset(i, of_value) == first + rows * second


@pytest.mark.skipif(_package() is None, reason="the package nvidia-cutlass is not installed")
def test_the_data_are_those_of_the_package() -> None:
    folder = _package()
    assert folder is not None
    text = (folder / "mma_traits_sm80.hpp").read_text()
    for name, layout in load().tf32_layouts.items():
        struct = "struct MMA_Traits<SM80_16x8x8_F32TF32TF32F32_TN>"
        assert _layout(text, struct, f"{name}Layout") == layout, name


FAULTS = [
    ("misaligned", "ldmatrix: row address .* is no multiple of 16"),
    ("past_end", "shared memory: 16 bytes at byte 1024, of 1024"),
    ("not_shared", "expected an address of shared memory"),
    ("unfinished", "while a cp.async into it is under way"),
    ("no_barrier", "no barrier in between|under way|before anything was written"),
    ("lane_missing", "ldmatrix at line .*: lane 5 of the mask .* has returned|not reached by all"),
    ("mma_divergent", "mma.sync with mask .* meets mma.sync|not reached by all"),
    ("not_rounded", "mma.sync: operand .* was not rounded to TF32"),
]


def run(fault: str, seed: int) -> torch.Tensor:
    x = torch.randn(256)
    y = nan_like((256,))
    with registered(seed, x=x, out_y=y) as emulated:
        emulated.run_mma_fault(address(y), address(x), list(emulated.mma_faults).index(fault))
    return y


def test_without_a_fault_it_runs() -> None:
    assert bool(torch.isfinite(run("none", 0)).all())


@pytest.mark.skipif(ASAN, reason="the checks of accesses are those of the other variant")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("fault", "message"), FAULTS, ids=lambda v: str(v)[:24])
def test_faults_are_found(fault: str, message: str, seed: int) -> None:
    with pytest.raises(RuntimeError, match=rf"^selftest mma: launch failed: .*({message})"):
        run(fault, seed)
