"""Hostile calls on SparsityPattern and on the constructors of layers: hand-made index arrays.

Which arrays are right is decided by loops over Python integers (hostile_model.csr_is_right); what
they call right must be taken as it is, everything else refused with a message.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from hostile_model import Draw, called, csr_is_right, generator, mask_of, refused, sides
from torch import Tensor

from sparse_kernels.nn import SparseConv2d, SparseLinear
from sparse_kernels.pattern import PatternError, SparsityPattern

INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)
AWKWARD = (-1, 0, 1, 2, 7, 100, 2**31 - 1, -(2**31), 2**40, -(2**40))


class Grid:
    """A small matrix of blocks and a random right pattern in it, as Python integers."""

    def __init__(self, draw: Draw) -> None:
        parts = (draw.choice((1, 1, 2)), draw.choice((1, 1, 3)))
        block = (draw.integer(1, 3), draw.integer(1, 3))
        length = [side + draw.integer(0, 4) for side in block]
        self.shape = (parts[0] * length[0], parts[1] * length[1])
        self.block, self.parts = block, parts
        self.rows = sides(self.shape[0], parts[0], block[0])
        self.cols = sides(self.shape[1], parts[1], block[1])
        blocks = len(self.rows) * len(self.cols)
        count = draw.integer(0, blocks)
        self.keys = sorted(torch.randperm(blocks, generator=generator(draw))[:count].tolist())
        self.crow, self.col = self.csr()

    def csr(self) -> tuple[list[int], list[int]]:
        width = len(self.cols)
        crow = [sum(key < row * width for key in self.keys) for row in range(len(self.rows) + 1)]
        return crow, [key % width for key in self.keys]

    def options(self) -> dict[str, Any]:
        return {"block": self.block, "row_parts": self.parts[0], "col_parts": self.parts[1]}

    def pattern(self, capacity: int | None = None) -> SparsityPattern:
        keys = torch.tensor(self.keys, dtype=torch.int64)
        return SparsityPattern.from_keys(keys, self.shape, **self.options(), capacity=capacity)


def damaged(draw: Draw, array: list[int]) -> list[int]:
    """One entry changed, dropped, doubled or swapped with its neighbour; or nothing at all."""
    out, kind = list(array), draw.integer(0, 5)
    at = draw.integer(0, max(0, len(out) - 1))
    if kind == 0 or not out:
        return out if out else [draw.choice(AWKWARD)][: draw.integer(0, 1)]
    if kind == 1:
        out[at] = draw.choice(AWKWARD)
    elif kind == 2:
        out[at] += draw.choice((-1, 1))
    elif kind == 3:
        del out[at]
    elif kind == 4:
        out.insert(at, out[at])
    else:
        out[at - 1], out[at] = out[at], out[at - 1]
    return out


def tensor_of(draw: Draw, array: list[int]) -> Tensor:
    """The integers in a dtype that holds them all, plain or with strides."""
    fitting = [d for d in INTEGERS if all(torch.iinfo(d).min <= v <= torch.iinfo(d).max
                                          for v in array)]  # fmt: skip
    tensor = torch.tensor(array, dtype=draw.choice(fitting))
    if draw.integer(0, 3) == 0:  # every other element of a longer array
        tensor = torch.stack([tensor, torch.full_like(tensor, 77)], -1)[:, 0]
    return tensor


def wrong_kind(draw: Draw, tensor: Tensor) -> Any:
    """What is no integer tensor of one dimension."""
    kind = draw.integer(0, 4)
    if kind == 0:
        return tensor.double()
    if kind == 1:
        return tensor.bool()
    if kind == 2:
        return tensor[None]
    return tensor.tolist() if kind == 3 else tensor.to("meta").double()


class PatternRules:
    """Rules that need no layer; each makes its own small matrix."""

    def csr_arrays(self, draw: Draw) -> None:
        grid = Grid(draw)
        crow, col = damaged(draw, grid.crow), damaged(draw, grid.col)
        arrays: list[Any] = [tensor_of(draw, crow), tensor_of(draw, col)]
        right = csr_is_right(crow, col, len(grid.rows), len(grid.cols))
        if draw.integer(0, 7) == 0:
            at = draw.integer(0, 1)
            arrays[at], right = wrong_kind(draw, arrays[at]), False
        if not right:
            refused(lambda: SparsityPattern.from_csr(*arrays, grid.shape, **grid.options()))
            return
        called()
        pattern = SparsityPattern.from_csr(*arrays, grid.shape, **grid.options())
        pattern.validate()
        lines = [row for row in range(len(grid.rows)) for _ in range(crow[row], crow[row + 1])]
        keys = [row * len(grid.cols) + c for row, c in zip(lines, col, strict=False)]
        assert pattern.keys().tolist() == keys
        assert torch.equal(pattern.mask(), mask_of(keys, grid.rows, grid.cols))

    def keys_array(self, draw: Draw) -> None:
        grid = Grid(draw)
        keys = damaged(draw, grid.keys)
        blocks = len(grid.rows) * len(grid.cols)
        right = keys == sorted(set(keys)) and all(0 <= key < blocks for key in keys)
        tensor: Any = torch.tensor(keys, dtype=torch.int64)
        capacity = draw.choice((None, None, 0, len(keys) - 1, len(keys), len(keys) + 3, 2**40, -1))
        if capacity is not None:
            right = right and max(1, len(keys)) <= capacity < 2**31
        if draw.integer(0, 7) == 0:
            tensor, right = wrong_kind(draw, tensor), False

        def make() -> SparsityPattern:
            return SparsityPattern.from_keys(tensor, grid.shape, **grid.options(),
                                             capacity=capacity)  # fmt: skip

        if not right:
            refused(make)
            return
        called()
        pattern = make()
        pattern.validate()
        assert pattern.keys().tolist() == keys and pattern.nnzb == len(keys)
        assert capacity is None or pattern.capacity == capacity

    def index_arrays(self, draw: Draw) -> None:
        """All five arrays over memory of one's own: validate() alone stands before the kernels."""
        grid = Grid(draw)
        whole = grid.pattern(len(grid.keys) + 1 + draw.integer(0, 2))
        arrays = [array.tolist() for array in whole.tensors()]
        at = draw.integer(0, 4)
        changed = damaged(draw, arrays[at])
        right = changed == arrays[at]
        changed = [v for v in changed if -(2**31) <= v < 2**31]  # int32 holds no others
        right = right or changed == arrays[at]
        tensors = [torch.tensor(array, dtype=torch.int32) for array in arrays]
        tensors[at] = torch.tensor(changed, dtype=torch.int32)
        called()
        parts = grid.parts
        pattern = SparsityPattern.from_indices(*tensors, grid.shape, grid.block, *parts)
        if right:
            called()
            pattern.validate()
            assert pattern == whole
        else:
            refused(pattern.validate)

    def masks(self, draw: Draw) -> None:
        grid = Grid(draw)
        options = grid.options()
        mask = mask_of(grid.keys, grid.rows, grid.cols)
        blocks = torch.zeros(len(grid.rows), len(grid.cols), dtype=torch.bool)
        blocks.view(-1)[grid.keys] = True
        if draw.integer(0, 1):
            mask, blocks = mask.t().contiguous().t(), blocks.t().contiguous().t()
        called()
        assert SparsityPattern.from_mask(mask, **options).keys().tolist() == grid.keys
        called()
        made = SparsityPattern.from_block_mask(blocks, grid.shape, **options)
        assert made.keys().tolist() == grid.keys
        wrong = draw.choice((mask.int(), mask[0], mask[None], mask.tolist(), None))
        refused(lambda: SparsityPattern.from_mask(wrong, **options))
        wrong = draw.choice((blocks.int(), blocks[1:], blocks[:, 1:], blocks[None], 3))
        refused(lambda: SparsityPattern.from_block_mask(wrong, grid.shape, **options))

    def torch_matrices(self, draw: Draw) -> None:
        """torch.sparse_csr and sparse_bsr matrices that torch did not check."""
        grid = Grid(draw)
        crow, col = damaged(draw, grid.crow), damaged(draw, grid.col)
        crow = [v for v in crow if -(2**31) <= v < 2**31]
        col = [v for v in col if -(2**31) <= v < 2**31]
        dtype = draw.choice((torch.int32, torch.int64))
        # Blocks of the grid as single elements: torch knows no partial blocks.
        shape = (len(grid.rows), len(grid.cols))
        values = torch.arange(1.0, 1.0 + len(col))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's "beta state"
            matrix = torch.sparse_csr_tensor(
                torch.tensor(crow, dtype=dtype), torch.tensor(col, dtype=dtype), values, shape,
                check_invariants=False,
            )  # fmt: skip
        if not csr_is_right(crow, col, *shape):
            refused(lambda: SparsityPattern.from_torch(matrix))
            return
        called()
        pattern, found = SparsityPattern.from_torch(matrix)
        assert pattern.nnzb == crow[-1]
        if crow[-1]:
            assert torch.equal(found.reshape(-1)[: crow[-1]], values[: crow[-1]])

    def matrices(self, draw: Draw) -> None:
        """compress and expand with matrices and values of right and of wrong shapes."""
        grid = Grid(draw)
        pattern = grid.pattern(len(grid.keys) + 1)
        dense = torch.randn(grid.shape, generator=generator(draw))
        called()
        values = pattern.compress(dense.t().contiguous().t() if draw.integer(0, 1) else dense)
        kept = dense * mask_of(grid.keys, grid.rows, grid.cols)
        called()
        assert torch.equal(pattern.expand(values), kept)
        wrong = draw.choice((dense[1:], dense[:, 1:], dense[None], dense[0]))
        refused(lambda: pattern.compress(wrong))
        if grid.keys:
            short = draw.choice((values[: len(grid.keys) - 1], values[None], values[0]))
            refused(lambda: pattern.expand(short))

    def wrong_grid(self, draw: Draw) -> None:
        """One wrong number among shape, block and segments."""
        grid = Grid(draw)
        arguments: dict[str, Any] = {"shape": grid.shape, **grid.options()}
        name = draw.choice(tuple(arguments))
        bad: tuple[Any, ...] = (
            0,
            -1,
            1.5,
            "2",
            None,
            True,
            2**40,
            (0, 1),
            (1,),
            (1, 2, 3),
            [-1, 1],
        )
        bad += ((2**31, 1), (1, 2**31)) if name in ("shape", "block") else (10**6 + 3,)
        arguments[name] = draw.choice(bad)
        refused(lambda: SparsityPattern.random(nnzb=1, **arguments))

    def wrong_layer(self, draw: Draw) -> None:
        """A constructor with one wrong argument."""
        bad: dict[str, tuple[Any, ...]] = {
            "in": (0, -3, 2.5, "4", None, True), "out": (0, -1, 1.5, None),
            "density": (0, -0.1, 1.01, float("nan"), "0.5", None, True, float("inf")),
            "block": (0, -1, (1,), (1, 2, 3), (99, 1), "4", (1.0, 1), (0, 1)),
            "dtype": (torch.int32, torch.bool), "capacity": (-1, 0, 1.5, 2**33, "3"),
            "pattern": (SparsityPattern.random((3, 5), 0.5), SparsityPattern.full((4, 6), (2, 2))),
        }  # fmt: skip
        conv: dict[str, tuple[Any, ...]] = {
            "kernel_size": (0, -1, (1, 2, 3), 1.5, "3", None), "stride": (0, -1, (1,), 1.5),
            "padding": (-1, (1, 2, 3), "all", 0.5), "dilation": (0, -2, "1"),
            "groups": (0, -1, 5, 1.5), "padding_mode": ("none", 0),
        }  # fmt: skip
        linear = bool(draw.integer(0, 1))
        name = draw.choice(tuple(bad) if linear else (*bad, *conv))
        value = draw.choice((bad | conv)[name])
        options = {} if name in ("in", "out") else {name: value}
        sizes = [value if name == "in" else 4, value if name == "out" else 6]
        if linear:
            refused(lambda: SparseLinear(*sizes, **options))
        else:
            kernel = options.pop("kernel_size", 2)
            refused(lambda: SparseConv2d(*sizes, kernel, **options))

    def wrong_pattern_in_layer(self, draw: Draw) -> None:
        """A layer made of a pattern whose arrays were written behind its back."""
        pattern = SparsityPattern.random(
            (6, 4), nnzb=draw.integer(1, 24), generator=generator(draw)
        )
        array = draw.choice(pattern.tensors())
        at = draw.integer(0, array.numel() - 1)
        array[at] = int(array[at]) + draw.choice((-3, -1, 1, 2, 10**6))
        refused(lambda: SparseLinear(4, 6, pattern=pattern), (PatternError,))
