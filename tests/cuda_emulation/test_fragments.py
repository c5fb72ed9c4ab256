"""Fragments of mma.sync and ldmatrix against CuTe's layouts: an independent description.

The layouts below are those of the package nvidia-cutlass 4.2.0 (include/cute/atom):
MMA_Traits<SM80_16x8x16_F16F16F16F16_TN> in mma_traits_sm80.hpp, from which the float32 and
bfloat16 forms inherit, and Copy_Traits<SM75_U32x4_LDSM_N>, <SM75_U16x8_LDSM_T> in
copy_traits_sm75.hpp. A layout maps (thread, value) to sum(coordinate * stride), the first mode of a
shape fastest; A is indexed m + 16 k, B n + 8 k, C m + 16 n, the matrices of ldmatrix in bits.
test_layouts_are_those_of_the_package reads them from the package where it is installed.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from emulator import address, nan_like, registered

Layout = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]
# ((shape, stride) of the thread, (shape, stride) of the value)
MMA_A: Layout = (((4, 8), (32, 1)), ((2, 2, 2), (16, 8, 128)))
MMA_B: Layout = (((4, 8), (16, 1)), ((2, 2), (8, 64)))
MMA_C: Layout = (((4, 8), (32, 1)), ((2, 2), (16, 8)))
LOAD: Layout = (((32,), (32,)), ((32, 4), (1, 1024)))
LOAD_TRANSPOSED: Layout = (((4, 8), (256, 16)), ((16, 2, 4), (1, 128, 1024)))


def offset(index: int, mode: tuple[tuple[int, ...], tuple[int, ...]]) -> int:
    total = 0
    for size, stride in zip(*mode, strict=True):
        total, index = total + index % size * stride, index // size
    return total


def positions(layout: Layout, values: int) -> list[list[int]]:
    return [[offset(t, layout[0]) + offset(v, layout[1]) for v in range(values)] for t in range(32)]


def row_major(layout: Layout, values: int, rows: int, columns: int, swap: bool) -> torch.Tensor:
    """Offsets into a row-major matrix [rows, columns]; `swap`: the layout counts columns first."""
    fast = columns if swap else rows
    found = [
        [
            (p // fast) * columns + p % fast if swap else (p % fast) * columns + p // fast
            for p in line
        ]
        for line in positions(layout, values)
    ]
    return torch.tensor(found, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mma(dtype: torch.dtype) -> None:
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    d = nan_like((16, 8))
    at_a = row_major(MMA_A, 8, 16, 16, False)
    at_b = row_major(MMA_B, 4, 16, 8, True)  # n + 8 k is row-major [k, n]
    at_d = row_major(MMA_C, 4, 16, 8, False)
    with registered(a=a, b=b, out_d=d, at_a=at_a, at_b=at_b, at_d=at_d) as emulated:
        run = emulated.run_mma_half if dtype == torch.float16 else emulated.run_mma_bfloat16
        run(*map(address, (d, a, b, at_a, at_b, at_d)))
    torch.testing.assert_close(d, a.float() @ b.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed: bool) -> None:
    x = torch.arange(256, dtype=torch.int16)
    y = torch.zeros(32, 4, dtype=torch.int32)
    with registered(x=x, out_y=y) as emulated:
        emulated.run_matrices(address(y), address(x), transposed)
    layout = LOAD_TRANSPOSED if transposed else LOAD
    bits = positions(layout, 128)  # 4 words of 32 bits per lane
    expected = [[bits[lane][16 * half] // 16 for half in range(8)] for lane in range(32)]
    assert y.view(torch.int16).tolist() == expected


def _package() -> Path | None:
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "source" / "include" / "cute" / "atom"


def _layout(text: str, struct: str, name: str) -> Layout:
    """The layout `name` of one struct of a CuTe header, by its two nested tuples."""
    body = text[text.index(struct) :]
    found = re.search(rf"{name}\s*=\s*(Layout<.*?>;|\w+;)", body, re.DOTALL)
    assert found is not None, (struct, name)
    value = found[1]
    if not value.startswith("Layout"):  # a name given further up
        named = re.search(rf"using {value[:-1]}\s*=\s*(Layout<.*?>;)", text, re.DOTALL)
        assert named is not None, value
        value = named[1]
    shape, stride = re.findall(r"(?:Shape|Stride)\s*<((?:[^<>;]|<[^<>;]*>)*)>", value)
    modes = []
    for part in (shape, stride):
        items = re.findall(r"<([^<>]*)>|_(\d+)", part)
        modes.append([tuple(map(int, re.findall(r"\d+", a or b))) for a, b in items])
    return (modes[0][0], modes[1][0]), (modes[0][1], modes[1][1])


@pytest.mark.skipif(_package() is None, reason="the package nvidia-cutlass is not installed")
def test_layouts_are_those_of_the_package() -> None:
    folder = _package()
    assert folder is not None
    mma = (folder / "mma_traits_sm80.hpp").read_text()
    load = (folder / "copy_traits_sm75.hpp").read_text()
    traits = "struct MMA_Traits<SM80_16x8x16_F16F16F16F16_TN>"
    assert _layout(mma, traits, "ALayout") == MMA_A
    assert _layout(mma, traits, "BLayout") == MMA_B
    assert _layout(mma, traits, "CLayout") == MMA_C
    assert _layout(load, "struct Copy_Traits<SM75_U32x4_LDSM_N>", "DstLayout") == LOAD
    assert _layout(load, "struct Copy_Traits<SM75_U16x8_LDSM_T>", "DstLayout") == LOAD_TRANSPOSED
