"""Damaged index arrays and shapes beyond 32-bit offsets are refused with a ValueError.

Never a crash, an endless loop or a silently wrong result, whatever the index arrays hold: every
product, every instruction set of this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

native = pytest.importorskip("sparse_kernels._native", reason="the native module is not built")

THREADS = 2
GROUPS = {"linear": 1, "conv2d": 1, "conv2d, groups": 2}
CHANNELS, TAPS, BATCH, SIZE = 8, 9, 5, 4
BIG = 2**31 - 1


@pytest.fixture(params=native.supported_isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


class Problem:
    """A weight with every second block stored, over [CHANNELS, TAPS * CHANNELS / groups]."""

    def __init__(self, kind: str) -> None:
        self.linear, self.groups = kind == "linear", GROUPS[kind]
        self.pixels = 1 if self.linear else SIZE * SIZE
        self.rows = CHANNELS
        self.cols = CHANNELS if self.linear else TAPS * CHANNELS // self.groups
        where = [(r, c) for r in range(self.rows) for c in range(r % 2, self.cols, 2)]
        self.nnzb, self.capacity = len(where), len(where) + 2
        by_column = sorted(range(self.nnzb), key=lambda e: (where[e][1], e))
        self.arrays = {
            "crow_indices": self._starts([r for r, _ in where], self.rows),
            "col_indices": self._padded([c for _, c in where]),
            "t_crow": self._starts([c for _, c in where], self.cols),
            "t_row": self._padded([where[e][0] for e in by_column]),
            "t_perm": self._padded(by_column),
        }

    @staticmethod
    def _starts(lines: list[int], count: int) -> torch.Tensor:
        ends = [sum(line < i for line in lines) for i in range(count + 1)]
        return torch.tensor(ends, dtype=torch.int32)

    def _padded(self, index: list[int]) -> torch.Tensor:
        return torch.tensor(index + [0] * (self.capacity - self.nnzb), dtype=torch.int32)

    def run(self, product: str) -> torch.Tensor:
        """Runs one product; returns its output, which was filled with NaN before."""
        activation = torch.ones(CHANNELS * self.pixels * BATCH)
        values = torch.ones(self.capacity)
        out = torch.full_like(values if product == "wgrad" else activation, float("nan"))
        a = {name: array.data_ptr() for name, array in self.arrays.items()}
        index = [a["crow_indices"], a["col_indices"]]
        if product == "forward":
            pointers = [activation.data_ptr(), values.data_ptr(), 0, *index]
        elif product == "dgrad":
            index = [a["t_crow"], a["t_row"], a["t_perm"]]
            pointers = [activation.data_ptr(), values.data_ptr(), *index]
        else:
            pointers = [activation.data_ptr(), activation.data_ptr(), *index]
        name = ("linear" if self.linear else "conv2d") + (
            "" if product == "forward" else f"_{product}"
        )
        shape: list[object] = (
            [self.rows, self.cols, 1, 1, self.capacity, BATCH]
            if self.linear
            else [[BATCH, SIZE, SIZE, SIZE, SIZE, CHANNELS, CHANNELS, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1,
                   self.groups], 1, 1, self.capacity]
        )  # fmt: skip
        relu = [False] if product == "forward" else []
        getattr(native, name)(out.data_ptr(), *pointers, *shape, *relu, THREADS)
        return out


def _set(position: int, value: int) -> Callable[[torch.Tensor], None]:
    def change(array: torch.Tensor) -> None:
        array[position] = value

    return change


def _swap(array: torch.Tensor) -> None:
    array[:2] = array[:2].flip(0).clone()


STARTS = {
    "end past the capacity": _set(-1, BIG),
    "end one past the capacity": lambda array: array[-1].add_(3),
    "negative end": _set(-1, -1),
    "not from zero": _set(0, 1),
    "negative start": _set(0, -5),
    "decreasing": _set(2, 0),
    "leaping": _set(1, BIG),
    "negative inside": _set(1, -BIG),
}
INDEX = {
    "unsorted": _swap,
    "duplicate": lambda array: array[1].copy_(array[0]),
    "past the end": _set(0, 10_000),
    "largest": _set(1, BIG),
    "negative": _set(0, -1),
    "most negative": _set(0, -BIG - 1),
}
PERM = {"past the capacity": _set(1, 10_000), "largest": _set(0, BIG), "negative": _set(0, -1)}
DAMAGE = [
    (product, array, name, change)
    for product, arrays in (
        ("forward", {"crow_indices": STARTS, "col_indices": INDEX}),
        ("wgrad", {"crow_indices": STARTS, "col_indices": INDEX}),
        ("dgrad", {"t_crow": STARTS, "t_row": INDEX, "t_perm": PERM}),
    )
    for array, changes in arrays.items()
    for name, change in changes.items()
]


@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.parametrize(
    ("product", "array", "change"),
    [pytest.param(p, a, c, id=f"{p}-{a}-{n}") for p, a, n, c in DAMAGE],
)
def test_damaged_index_arrays_raise(
    kind: str, product: str, array: str, change: Callable[[torch.Tensor], None]
) -> None:
    problem = Problem(kind)
    assert not problem.run(product).isnan().any(), "the pattern is wrong before it is damaged"
    change(problem.arrays[array])
    with pytest.raises(ValueError, match=rf"^{array}\[\d+\] must .*SparsityPattern\.validate\(\)"):
        problem.run(product)


@pytest.mark.parametrize("product", ["forward", "dgrad", "wgrad"])
def test_damage_is_found_in_a_large_pattern(product: str) -> None:
    """Above some ten thousand entries several threads look; the position named is the first."""
    size, per_row = 300, 200
    problem = Problem("linear")
    problem.rows = problem.cols = size
    problem.nnzb = problem.capacity = size * per_row
    starts = torch.arange(0, size * per_row + 1, per_row, dtype=torch.int32)
    index = torch.arange(per_row, dtype=torch.int32).repeat(size)
    perm = torch.arange(size * per_row, dtype=torch.int32)
    names = ("crow_indices", "col_indices", "t_crow", "t_row", "t_perm")
    problem.arrays = dict(zip(names, (starts, index, starts, index, perm), strict=True))
    for at in (41_234, 55_555):
        index[at] = size
    with pytest.raises(ValueError, match=r"\[41234\] must be .* below 300, got 300"):
        problem.run(product)


@pytest.mark.parametrize(
    ("dilation", "kernel"), [((2**26, 1), (3, 1)), ((2**15, 2**15), (3, 3))], ids=str
)
def test_tiles_beyond_32_bit_offsets_raise(
    dilation: tuple[int, int], kernel: tuple[int, int]
) -> None:
    """Padding as large as the dilation keeps the output small; the packed window is not.

    The weight gradient packs the image without its border and stays right.
    """
    size = 5
    pad = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
    geom = [1, size, size, size, size, 2, 2, *kernel, 1, 1, *pad, *pad, *dilation, 1]
    taps = kernel[0] * kernel[1]
    dense = torch.ones(2 * 2 * taps)
    activation = torch.ones(2 * size * size)
    crow = torch.tensor([0, 2 * taps, 4 * taps], dtype=torch.int32)
    col = torch.arange(2 * taps, dtype=torch.int32).repeat(2)
    t_crow = torch.arange(0, 4 * taps + 1, 2, dtype=torch.int32)
    t_row = torch.tensor([0, 1], dtype=torch.int32).repeat(2 * taps)
    t_perm = torch.arange(4 * taps, dtype=torch.int32).view(2, -1).t().contiguous()
    a, v = activation.data_ptr(), dense.data_ptr()
    out = torch.full((2 * size * size,), float("nan"))
    index = [crow.data_ptr(), col.data_ptr()]
    t_index = [t_crow.data_ptr(), t_row.data_ptr(), t_perm.data_ptr()]
    shared = [geom, 1, 1, 4 * taps]
    message = rf"dilation {dilation[0]}x{dilation[1]}"
    with pytest.raises(ValueError, match=message):
        native.conv2d(out.data_ptr(), a, v, 0, *index, *shared, False, THREADS)
    with pytest.raises(ValueError, match=message):
        native.conv2d_dgrad(out.data_ptr(), a, v, *t_index, *shared, THREADS)
    native.conv2d_wgrad(dense.data_ptr(), a, a, *index, *shared, THREADS)
    want = torch.zeros(2, taps, 2)
    want[:, taps // 2] = size * size  # only the middle tap meets the image
    assert torch.equal(dense.view(want.shape), want)
