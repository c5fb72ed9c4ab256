"""What the hostile calls are played against: a dense matrix in float64, and plain Python.

Nothing here asks the library where a block lies or what a product gives: blocks are placed by
loops over Python integers, products are torch's on the dense matrix.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from sparse_kernels.nn import DENSE_MASKED, SparseLayer

#: What a refusal may be; IndexError, AssertionError, SystemError and the like are findings.
REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError)
COUNT = {"calls": 0, "refused": 0}
T = TypeVar("T")


class Draw(Protocol):
    """Where a rule takes its choices from: Hypothesis, or a plain seeded generator."""

    def integer(self, low: int, high: int) -> int: ...

    def choice(self, options: Sequence[T]) -> T: ...


class Plain:
    """Choices of `random.Random(seed)`: a thousandth of what Hypothesis' own cost."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        return low + int(self.rng.random() * (high - low + 1))

    def choice(self, options: Sequence[T]) -> T:
        return options[int(self.rng.random() * len(options))]


def generator(draw: Draw) -> torch.Generator:
    return torch.Generator().manual_seed(draw.integer(0, 2**31))


def called() -> None:
    COUNT["calls"] += 1


def refused(call: Callable[[], Any], also: tuple[type[Exception], ...] = ()) -> None:
    """`call` must be an error that says something."""
    COUNT["calls"] += 1
    try:
        call()
    except (*REFUSALS, *also) as problem:
        COUNT["refused"] += 1
        assert len(str(problem)) > 20, f"no message: {problem!r}"
    else:
        raise AssertionError("accepted what is wrong")


def near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    limit = 1e-4 if found.dtype == torch.float32 else 1e-10
    scale = float(expected.detach().abs().max()) if expected.numel() else 1.0
    close = torch.allclose(found.double(), expected, rtol=limit, atol=limit * max(scale, 1e-3))
    assert close, f"{found} instead of {expected}"


# ---- blocks ------------------------------------------------------------------------------------


def sides(size: int, parts: int, block: int) -> list[range]:
    """Rows (or columns) of each block row (column): no block spans two of `parts` segments."""
    length = size // parts
    starts = [part * length + at for part in range(parts) for at in range(0, length, block)]
    return [range(at, min(at + block, at - at % length + length)) for at in starts]


def mask_of(keys: list[int], rows: list[range], cols: list[range]) -> Tensor:
    """Bool [rows, cols] of the blocks `keys`."""
    mask = torch.zeros(rows[-1].stop, cols[-1].stop, dtype=torch.bool)
    for key in keys:
        r, c = rows[key // len(cols)], cols[key % len(cols)]
        mask[r.start : r.stop, c.start : c.stop] = True
    return mask


def csr_is_right(crow: list[int], col: list[int], rows: int, cols: int) -> bool:
    """Whether pointers and columns are those of a matrix of rows x cols blocks."""
    if len(crow) != rows + 1 or crow[0] != 0 or crow[-1] > len(col):
        return False
    if any(after < before for before, after in itertools.pairwise(crow)):
        return False
    lines = [col[start:stop] for start, stop in itertools.pairwise(crow)]
    return all(
        all(0 <= c < cols for c in line) and all(a < b for a, b in itertools.pairwise(line))
        for line in lines
    )


# ---- the dense layer ---------------------------------------------------------------------------


def dense_output(layer: SparseLayer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product on the padded image, so that it may have no pixels before."""
    if not hasattr(layer, "geometry"):
        return functional.linear(x, weight, bias)
    if x.dim() not in (3, 4):
        raise RuntimeError("expected 3 or 4 dimensions")
    kernel, dilation = layer.kernel_size, layer.dilation
    pads = layer.padding
    if pads == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        around = [total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2]
    else:
        around = [pads[1], pads[1], pads[0], pads[0]]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = functional.pad(x, around, mode=mode)
    return convolution(padded, weight, bias, layer.stride, dilation, layer.groups)


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, dilation: Any, groups: int
) -> Tensor:
    """conv2d of [.., C, H, W] as a sum over the taps of products of matrices.

    Not torch's own: test_hostile_findings.py has where torch 2.13 is wrong, or ends the process.
    """
    if x.shape[-3] != groups * weight.shape[1]:
        raise RuntimeError("channels differ")
    sizes = zip(x.shape[-2:], weight.shape[-2:], dilation, strict=True)
    free = [size - reach * (taps - 1) - 1 for size, taps, reach in sizes]
    if min(free) < 0:
        raise RuntimeError("kernel larger than the image")
    split = x.unflatten(-3, (groups, -1))
    out: Any = 0
    for row, col in itertools.product(range(weight.shape[2]), range(weight.shape[3])):
        top, left = row * dilation[0], col * dilation[1]
        seen = split[
            ..., top : top + free[0] + 1 : stride[0], left : left + free[1] + 1 : stride[1]
        ]
        taps = weight[:, :, row, col].unflatten(0, (groups, -1))
        out = out + torch.einsum("...gchw,goc->...gohw", seen, taps)
    out = out.flatten(-4, -3)
    return out if bias is None else out + bias[:, None, None]


class Model:
    """The dense twin of a layer: weight and bias in float64, and the mask of what exists."""

    def __init__(self, layer: SparseLayer) -> None:
        self.weight = layer.weight.detach().as_subclass(Tensor).double().clone()
        self.bias = None if layer.bias is None else layer.bias.detach().double().clone()
        self.rows = sides(layer.matrix_shape[0], layer.row_parts, layer.block[0])
        self.cols = sides(layer.matrix_shape[1], layer.col_parts, layer.block[1])
        self.mask = mask_of(layer.pattern.keys().tolist(), self.rows, self.cols)
        outside = layer.weight_to_matrix(self.weight)[~self.mask]
        assert not outside.any(), "weights where the pattern has none"

    def require_grad(self) -> None:
        self.weight.grad = None
        self.weight.requires_grad_()

    def output(self, layer: SparseLayer, x: Tensor) -> Tensor:
        return dense_output(layer, x, self.weight, self.bias)

    def stored(self, layer: SparseLayer, weight: Tensor) -> Tensor:
        """A weight (or its gradient) as the layer's `values` hold it, placed block by block."""
        matrix = layer.weight_to_matrix(weight)
        if layer.storage == DENSE_MASKED:
            return matrix * self.mask
        out = matrix.new_zeros(layer.values.shape)
        for at, key in enumerate(layer.pattern.keys().tolist()):
            r, c = self.rows[key // len(self.cols)], self.cols[key % len(self.cols)]
            out[at, : len(r), : len(c)] = matrix[r.start : r.stop, c.start : c.stop]
        return out

    def check(self, layer: SparseLayer) -> None:
        """The layer still holds what the model holds."""
        assert torch.equal(layer.weight.detach().double(), self.weight.detach())
        if self.bias is not None:
            assert torch.equal(layer.bias.detach().double(), self.bias)
