"""The native sparse products against a dense float64 oracle written here.

Nothing of the package above the native module is used. Outputs are filled with NaN before each
call, so that an element that no kernel wrote is seen. Every instruction set that this machine can
run is tested, also the emulated AVX-512 shapes where built.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

native = pytest.importorskip("sparse_kernels._native", reason="the native module is not built")

TOLERANCE = 1e-5  # relative Frobenius error of float32 sums of up to some thousand terms
ISAS = native.supported_isas()


@pytest.fixture(params=ISAS, autouse=True)
def isa(request):
    """Runs a test under one instruction set, then goes back to the one chosen at import."""
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


@dataclass
class Case:
    """A convolution; its matrix is [C_out, kh*kw*C_in/groups], padding top, left, bottom, right."""

    batch: int
    c_in: int
    c_out: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    block: tuple[int, int] = (1, 1)
    density: float = 0.3
    bias: bool = True
    relu: bool = False
    spare: int = 3  # capacity beyond what is stored
    seed: int = 0

    @property
    def out_size(self) -> tuple[int, int]:
        top, left, bottom, right = self.padding
        room = (self.size[0] + top + bottom, self.size[1] + left + right)
        return tuple(  # type: ignore[return-value]
            max(0, (room[d] - (self.kernel[d] - 1) * self.dilation[d] - 1) // self.stride[d] + 1)
            for d in (0, 1)
        )

    @property
    def geom(self) -> list[int]:
        return [self.batch, *self.size, *self.out_size, self.c_out, self.c_in, *self.kernel,
                *self.stride, *self.padding, *self.dilation, self.groups]  # fmt: skip

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]


def block_starts(parts: int, size: int, block: int) -> list[tuple[int, int]]:
    """(start, length) of every block along one side of the matrix; none spans two parts."""
    segment = size // parts
    return [
        (part * segment + at, min(block, segment - at))
        for part in range(parts)
        for at in range(0, segment, block)
    ]


class Weight:
    """A random pattern with its indices and values, and the dense matrix that they stand for."""

    def __init__(self, case: Case, empty_rows: bool) -> None:
        gen = torch.Generator().manual_seed(case.seed)
        self.rows, self.cols = case.c_out, case.taps * case.c_in // case.groups
        row_blocks = block_starts(case.groups, self.rows, case.block[0])
        col_blocks = block_starts(case.taps, self.cols, case.block[1])
        mask = torch.rand(len(row_blocks), len(col_blocks), generator=gen) < case.density
        if empty_rows:
            mask[::3] = False
        self.nnzb = int(mask.sum())
        self.capacity = max(1, self.nnzb + case.spare)
        self.crow = self.starts(mask.sum(1))
        self.t_crow = self.starts(mask.sum(0))
        where = mask.nonzero()
        by_column = (where[:, 1] * len(row_blocks) + where[:, 0]).argsort()
        self.col = self.padded(where[:, 1])
        self.t_row = self.padded(where[by_column, 0])
        self.t_perm = self.padded(by_column)
        self.places = [(row_blocks[i], col_blocks[j]) for i, j in where.tolist()]
        # What no kernel may read: entries outside the matrix and past the last block are NaN.
        self.values = torch.full((self.capacity, *case.block), float("nan"))
        self.dense = torch.zeros(self.rows, self.cols, dtype=torch.float64)
        for e, ((r, height), (c, width)) in enumerate(self.places):
            block = torch.randn(height, width, generator=gen)
            self.values[e, :height, :width] = block
            self.dense[r : r + height, c : c + width] = block.double()

    @staticmethod
    def starts(counts: torch.Tensor) -> torch.Tensor:
        return F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)

    def padded(self, index: torch.Tensor) -> torch.Tensor:
        return F.pad(index, (0, self.capacity - self.nnzb)).to(torch.int32).contiguous()

    def conv_weight(self, case: Case) -> torch.Tensor:
        per_group = case.c_in // case.groups
        return self.dense.view(case.c_out, *case.kernel, per_group).permute(0, 3, 1, 2)

    def sampled(self, matrix: torch.Tensor) -> torch.Tensor:
        """The stored entries of a dense matrix; zero past the end and outside the matrix."""
        out = torch.zeros(self.values.shape, dtype=torch.float64)
        for e, ((r, height), (c, width)) in enumerate(self.places):
            out[e, :height, :width] = matrix[r : r + height, c : c + width]
        return out


def feature_major(t: torch.Tensor) -> torch.Tensor:
    """[N, ...] -> contiguous [..., N]."""
    return t.movedim(0, -1).contiguous()


def pointers(*tensors: torch.Tensor | None) -> list[int]:
    """Addresses as the native module takes them; None is null."""
    return [0 if t is None else t.data_ptr() for t in tensors]


def nan_filled(*shape: int) -> torch.Tensor:
    return torch.full(shape, float("nan"))


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative Frobenius error; NaN anywhere gives NaN, which no comparison accepts."""
    difference = (got.double() - want).norm().item()
    return difference / max(want.norm().item(), 1e-30) if difference else difference


def oracle(case: Case, weight: Weight, x: torch.Tensor, grad: torch.Tensor, bias: torch.Tensor):
    """y, dx, dW of the dense convolution in float64."""
    if 0 in case.out_size:  # torch refuses to compute it
        return grad, torch.zeros_like(x).double(), torch.zeros_like(weight.dense)
    top, left, bottom, right = case.padding
    x64 = x.double().requires_grad_()
    w64 = weight.conv_weight(case).clone().requires_grad_()
    z = F.conv2d(F.pad(x64, (left, right, top, bottom)), w64, None, case.stride, 0, case.dilation,
                 case.groups)  # fmt: skip
    dx, dw = torch.autograd.grad(z, (x64, w64), grad.double())
    y = z.detach() + (bias.double().view(1, -1, 1, 1) if case.bias else 0)
    return (y.relu() if case.relu else y), dx, dw.permute(0, 2, 3, 1).reshape(weight.dense.shape)


def run_native(case: Case, w: Weight, x: torch.Tensor, grad: torch.Tensor, bias, threads: int):
    """y, dx (feature-major) and dvalues from the native module."""
    y = nan_filled(case.c_out, *case.out_size, case.batch)
    dx = nan_filled(case.c_in, *case.size, case.batch)
    dvalues = nan_filled(*w.values.shape)
    bh, bw = case.block
    native.conv2d(
        *pointers(y, x, w.values, bias if case.bias else None, w.crow, w.col),
        case.geom,
        bh,
        bw,
        w.capacity,
        case.relu,
        threads,
    )
    shared = (case.geom, bh, bw, w.capacity)
    native.conv2d_dgrad(
        *pointers(dx, grad, w.values, w.t_crow, w.t_row, w.t_perm), *shared, threads
    )
    native.conv2d_wgrad(*pointers(dvalues, grad, x, w.crow, w.col), *shared, threads)
    return y, dx, dvalues


def check(case: Case, empty_rows: bool = False) -> None:
    """Parity with the oracle, and equal bits for 1, 2, 3 and 7 threads."""
    weight = Weight(case, empty_rows)
    gen = torch.Generator().manual_seed(case.seed + 1)
    x = torch.randn(case.batch, case.c_in, *case.size, generator=gen)
    grad = torch.randn(case.batch, case.c_out, *case.out_size, generator=gen)
    bias = torch.randn(case.c_out, generator=gen)
    y, dx, dw = oracle(case, weight, x, grad, bias)
    args = (feature_major(x), feature_major(grad), bias)
    got = run_native(case, weight, *args, threads=1)
    want = (feature_major(y), feature_major(dx), weight.sampled(dw))
    for name, g, w in zip(("y", "dx", "dvalues"), got, want, strict=True):
        assert error(g, w) <= TOLERANCE, f"{name} of {case}"
    for threads in (2, 3, 7):
        again = run_native(case, weight, *args, threads=threads)
        for name, g, a in zip(("y", "dx", "dvalues"), got, again, strict=True):
            assert torch.equal(g, a), f"{name} of {case} differs with {threads} threads"


BATCHES = (0, 1, 3, 16, 37)
BLOCKS = ((1, 1), (2, 1), (4, 1), (8, 1), (3, 5), (1, 4), (16, 16))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_conv2d_matches_dense_for_every_batch_and_block(batch: int, block: tuple[int, int]) -> None:
    """Partial blocks (19 and 13 channels), empty rows, tails of the batch."""
    check(Case(batch, 13, 19, (7, 6), block=block, relu=batch == 16), empty_rows=True)


GEOMETRIES = [
    Case(5, 3, 4, (9, 8), (1, 1), padding=(0, 0, 0, 0)),
    Case(5, 3, 4, (9, 8), (1, 1), padding=(1, 1, 1, 1)),  # VGG16-C: outputs that see padding only
    Case(20, 6, 10, (12, 11), (5, 5), (2, 2), (2, 2, 2, 2), block=(4, 2)),
    Case(33, 5, 7, (14, 15), (11, 11), (2, 2), (2, 2, 2, 2)),
    Case(9, 4, 6, (8, 13), (3, 3), (3, 2), (0, 1, 2, 3), (1, 2)),
    Case(9, 4, 6, (13, 8), (3, 2), (2, 3), (4, 0, 1, 0), (2, 2), block=(2, 3)),
    Case(17, 8, 12, (6, 6), (3, 3), groups=4, block=(2, 1)),
    Case(17, 6, 6, (6, 6), (3, 3), groups=6, density=0.7),
    Case(18, 10, 15, (5, 7), (2, 3), (2, 1), (0, 2, 1, 0), groups=5, block=(4, 4)),
    Case(64, 9, 8, (2, 2), block=(4, 1)),
    Case(130, 9, 8, (1, 1), density=0.5),
    Case(16, 2, 3, (3, 40), (3, 3), (1, 1), (1, 1, 1, 1)),
    Case(16, 2, 3, (40, 3), (7, 1), (1, 1), (3, 0, 3, 0)),
    Case(7, 3, 5, (4, 4), (3, 3), padding=(5, 6, 7, 4)),  # taps entirely outside for whole rows
    Case(7, 3, 5, (4, 4), (3, 3), (4, 4), (0, 0, 0, 0)),  # pixels that no tap reaches
    Case(3, 2, 2, (2, 2), (3, 3), padding=(0, 0, 0, 0)),  # empty output
    Case(40, 300, 24, (9, 9), block=(1, 1), density=0.05),  # several bands of channels
    Case(24, 90, 20, (17, 35), block=(2, 1), density=0.1),  # several tiles
    Case(130, 200, 33, (4, 4), block=(2, 1), density=0.1),
    # dgrad scatters (scatter_rows.h): partial groups, two bands, groups and phases, one pixel
    Case(16, 40, 43, (4, 5), block=(8, 1)),
    Case(19, 300, 24, (3, 3), block=(4, 1)),
    Case(9, 48, 78, (5, 6), (3, 3), (2, 1), groups=2, block=(4, 1), density=0.5),
    Case(8, 301, 70, (1, 1), (1, 1), padding=(0, 0, 0, 0), block=(4, 1), density=0.6),
    # Flattened, by long rows or not; scattered input gradients; pixels cleared for a stride.
    Case(16, 24, 40, (9, 10), (1, 1), padding=(0, 0, 0, 0), density=0.1),
    Case(32, 24, 16, (7, 7), (1, 1), padding=(0, 0, 0, 0), groups=2, block=(4, 1)),
    Case(32, 5, 12, (9, 11), density=0.1, relu=True),
    Case(33, 3, 20, (17, 15), (7, 7), (2, 2), (3, 3, 3, 3), density=0.05),
    Case(70, 40, 24, (7, 9), (1, 1), (2, 2), (0, 0, 0, 0), density=0.2),
    Case(8, 16, 16, (6, 6), density=0.0),
    Case(8, 16, 16, (6, 6), density=0.0, spare=0, bias=False),
    Case(8, 16, 16, (6, 6), density=1.0, spare=0, relu=True),
]


@pytest.mark.parametrize("case", GEOMETRIES, ids=lambda c: "-".join(map(str, c.geom)))
def test_conv2d_matches_dense_for_every_geometry(case: Case) -> None:
    check(case)


def random_case(seed: int) -> Case:
    """An odd configuration drawn from the seed."""
    gen = torch.Generator().manual_seed(seed)

    def draw(*options):
        return options[int(torch.randint(len(options), (1,), generator=gen))]

    groups = draw(1, 1, 2, 3)
    kernel = (draw(1, 2, 3, 5), draw(1, 2, 3, 4, 7))
    return Case(
        batch=draw(1, 2, 8, 15, 31, 64),
        c_in=groups * draw(1, 2, 5, 11),
        c_out=groups * draw(1, 3, 8, 13),
        size=(draw(1, 3, 8, 13), draw(2, 5, 8, 19)),
        kernel=kernel,
        stride=(draw(1, 1, 2, 3), draw(1, 1, 2, 3)),
        padding=(draw(0, 1, 2), draw(0, 1, 3), draw(0, 1, 4), draw(0, 2)),
        dilation=(draw(1, 1, 2), draw(1, 1, 2)),
        groups=groups,
        block=draw(*BLOCKS, (32, 32), (5, 2)),
        density=draw(0.05, 0.3, 0.9),
        bias=draw(True, False),
        relu=draw(True, False),
        seed=seed,
    )


@pytest.mark.parametrize("seed", range(40))
def test_conv2d_matches_dense_for_random_configurations(seed: int) -> None:
    check(random_case(seed), empty_rows=seed % 2 == 0)


@pytest.mark.parametrize("block", [(1, 1), (4, 1), (3, 5), (16, 16)], ids=str)
@pytest.mark.parametrize(
    ("rows", "cols", "batch"), [(7, 97, 40), (300, 784, 37), (1, 1, 1), (50, 3000, 9)]
)
def test_linear_matches_dense(rows: int, cols: int, batch: int, block: tuple[int, int]) -> None:
    case = Case(batch, cols, rows, (1, 1), (1, 1), padding=(0, 0, 0, 0), block=block, density=0.1)
    w = Weight(case, empty_rows=rows > 1)
    gen = torch.Generator().manual_seed(3)
    x, grad = torch.randn(cols, batch, generator=gen), torch.randn(rows, batch, generator=gen)
    bias = torch.randn(rows, generator=gen)
    y, dx, dv = nan_filled(rows, batch), nan_filled(cols, batch), nan_filled(*w.values.shape)
    bh, bw = block
    shared = (rows, cols, bh, bw, w.capacity, batch)
    native.linear(*pointers(y, x, w.values, bias, w.crow, w.col), *shared, True, 2)
    native.linear_dgrad(*pointers(dx, grad, w.values, w.t_crow, w.t_row, w.t_perm), *shared, 2)
    native.linear_wgrad(*pointers(dv, grad, x, w.crow, w.col), *shared, 2)
    assert error(y, (w.dense @ x.double() + bias.double()[:, None]).relu()) <= TOLERANCE
    assert error(dx, w.dense.T @ grad.double()) <= TOLERANCE
    assert error(dv, w.sampled(grad.double() @ x.double().T)) <= TOLERANCE


def test_large_outputs_past_the_cache_are_right() -> None:
    """Above 12 MB the stores bypass the cache; a batch of 40 mixes full and partial lane groups."""
    for batch in (40, 64):
        check(Case(batch, 4, 144, (24, 26), (1, 1), padding=(0,) * 4, density=0.1))


def test_nan_passes_the_relu_and_unaligned_pointers_work() -> None:
    case = Case(16, 4, 6, (5, 5), density=1.0, relu=True)
    w = Weight(case, empty_rows=False)
    shift = 1  # one float off every alignment
    x = torch.randn(4 * 25 * 16 + shift)[shift:]
    x[7] = float("nan")
    y = nan_filled(6 * 25 * 16 + shift)[shift:]
    native.conv2d(
        *pointers(y, x, w.values, None, w.crow, w.col), case.geom, 1, 1, w.capacity, True, 2
    )
    want = F.conv2d(
        x.view(4, 5, 5, 16).movedim(-1, 0).double(), w.conv_weight(case), padding=1
    ).relu()
    assert torch.allclose(
        y.view(6, 5, 5, 16).movedim(-1, 0).double(), want, atol=1e-4, equal_nan=True
    )
    assert want.isnan().any()


def test_scratch_is_counted_reused_released_and_independent_of_the_dense_size() -> None:
    native.release_scratch()
    assert native.scratch_bytes() == native.scratch_peak() == 0
    rows = cols = 20000  # a dense weight would be 1.6 GB
    case = Case(4, cols, rows, (1, 1), (1, 1), padding=(0, 0, 0, 0), density=0.0)
    index = torch.arange(rows + 1, dtype=torch.int32)  # the identity matrix
    values = torch.ones(rows)
    x, y, dv = torch.randn(cols, 4), nan_filled(rows, 4), nan_filled(rows)
    for _ in range(2):
        shared = (rows, cols, 1, 1, rows, case.batch)
        native.linear(*pointers(y, x, values, None, index, index), *shared, False, 2)
        native.linear_wgrad(*pointers(dv, y, x, index, index), *shared, 2)
        assert torch.equal(y, x)
        assert torch.allclose(dv, (x * x).sum(1))
    assert 0 < native.scratch_bytes() <= native.scratch_peak() < 16 << 20
    native.release_scratch()
    assert native.scratch_bytes() == native.scratch_peak() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threads": 0}, "threads"),
        ({"y": 0}, "y must not be null"),
        ({"bh": 0}, "bh"),
        ({"capacity": -1}, "capacity"),
        ({"geom": [1, 2]}, "18 integers"),
        ({"geom": [1, 3, 3, 9, 9, 1, 1, 3, 3, 1, 1, 0, 0, 0, 0, 1, 1, 1]}, "out_h"),
        ({"geom": [1, 1, 1, 1, 1, 1, 1, 3, 3, 1, 1, *[2**60] * 4, 2**60, 2**60, 1]}, "2\\^40"),
        ({"geom": [1, 3, 3, 1, 1, 2, 3, 3, 3, 1, 1, 0, 0, 0, 0, 1, 1, 2]}, "groups"),
    ],
)
def test_wrong_arguments_raise_value_errors(change: dict[str, object], message: str) -> None:
    t = torch.zeros(64)
    i = torch.zeros(8, dtype=torch.int32)
    args = dict(zip(("y", "x", "values", "crow", "col"), pointers(t, t, t, i, i), strict=True))
    args |= {"bias": 0, "geom": Case(1, 1, 1, (3, 3)).geom, "bh": 1, "bw": 1, "relu": False}
    args |= {"threads": 1, "capacity": 8}
    native.conv2d(**args)
    with pytest.raises(ValueError, match=message):
        native.conv2d(**(args | change))


def test_blocks_and_batches_cover_the_register_shapes() -> None:
    """All combinations of one small layer: widths 1 to 9 meet every number of pixels per kernel."""
    for width, block_rows in itertools.product((1, 2, 3, 4, 5, 8, 9), (1, 2, 4, 8, 16)):
        check(Case(24, 3, 16, (2, width), block=(block_rows, 2), density=0.5))
