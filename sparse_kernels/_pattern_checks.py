"""Errors and argument checks of patterns: each message says where, what came, what to do."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1
_INTEGER_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class PatternError(ValueError):
    """An invalid index array of a sparsity pattern; the message names array and position."""


def check_int(name: str, value: Any, minimum: int, maximum: int = INT32_MAX) -> int:
    """`value` as int; TypeError unless integral, ValueError unless in [minimum, maximum]."""
    if isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer, got the bool {value}; pass a number")
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name}: expected an integer, got {value!r} ({type(value).__name__}); pass an int"
        ) from None
    if not minimum <= number <= maximum:
        limit = f" to {maximum} (indices are int32)" if maximum == INT32_MAX else f" to {maximum}"
        raise ValueError(f"{name}: expected {minimum}{limit}, got {number}; change {name}")
    return number


def check_pair(name: str, value: Any) -> tuple[int, int]:
    """`value` as a pair of positive integers that fit int32; TypeError or ValueError otherwise."""
    try:
        first, second = value
    except (TypeError, ValueError):
        raise TypeError(
            f"{name}: expected a pair of integers, got {value!r}; pass a tuple such as (4, 1)"
        ) from None
    return check_int(f"{name}[0]", first, 1), check_int(f"{name}[1]", second, 1)


def check_tensor(name: str, value: Any, ndim: int) -> Tensor:
    """`value` if it is a tensor with `ndim` dimensions; TypeError or PatternError otherwise."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: expected a torch.Tensor, got {type(value).__name__}; use torch.as_tensor"
        )
    if value.layout != torch.strided:
        raise TypeError(
            f"{name}: expected a dense (strided) tensor, got layout {value.layout}; "
            f"pass its parts, or use SparsityPattern.from_torch"
        )
    if value.ndim != ndim:
        raise PatternError(
            f"{name}: expected {ndim} dimension(s), got shape {tuple(value.shape)}; reshape it"
        )
    return value


def check_bool(name: str, value: Any, shape: tuple[int, int]) -> Tensor:
    """`value` if it is a bool tensor of `shape`; TypeError or PatternError otherwise."""
    check_tensor(name, value, 2)
    if value.dtype != torch.bool:
        raise TypeError(f"{name}: expected dtype torch.bool, got {value.dtype}; pass `{name} != 0`")
    if tuple(value.shape) != shape:
        raise PatternError(f"{name}: expected shape {shape}, got {tuple(value.shape)}")
    return value


def check_integers(name: str, value: Any) -> Tensor:
    """`value` as a one-dimensional int64 tensor; TypeError or PatternError otherwise."""
    check_tensor(name, value, 1)
    if value.dtype not in _INTEGER_DTYPES:
        raise TypeError(f"{name}: expected an integer dtype, got {value.dtype}; pass {name}.long()")
    return value.to(torch.int64)


def first_index(wrong: Tensor) -> int | None:
    """Position of the first True of a one-dimensional bool tensor, or None."""
    if not bool(wrong.any()):
        return None
    return int(wrong.nonzero()[0, 0])


def check_keys(keys: Any, blocks: int, block_cols: int) -> Tensor:
    """Check that `keys` is int64, strictly increasing and within [0, blocks)."""
    check_tensor("keys", keys, 1)
    if keys.dtype != torch.int64:
        raise TypeError(f"keys: expected dtype torch.int64, got {keys.dtype}; pass keys.long()")
    at = first_index((keys < 0) | (keys >= blocks))
    if at is not None:
        raise PatternError(
            f"keys[{at}]: expected 0 to {blocks - 1} (block_row * {block_cols} + block_col), "
            f"got {int(keys[at])}; drop or correct it"
        )
    at = first_index(keys[1:] <= keys[:-1])
    if at is not None:
        kind = "a duplicate of" if int(keys[at]) == int(keys[at + 1]) else "smaller than"
        raise PatternError(
            f"keys[{at + 1}]: expected strictly increasing keys, got {int(keys[at + 1])}, {kind} "
            f"keys[{at}]; pass torch.unique(keys)"
        )
    return keys


def check_crow(name: str, crow: Tensor, segments: int, entries: int) -> None:
    """Check row (or transposed column) pointers `crow` [segments + 1] over `entries` places."""
    if crow.numel() != segments + 1:
        raise PatternError(
            f"{name}: expected {segments + 1} entries (one more than block rows or columns), "
            f"got {crow.numel()}"
        )
    if int(crow[0]) != 0:
        raise PatternError(f"{name}[0]: expected 0, got {int(crow[0])}; pointers start at 0")
    at = first_index(crow[1:] < crow[:-1])
    if at is not None:
        raise PatternError(
            f"{name}[{at + 1}]: expected at least {name}[{at}] = {int(crow[at])}, "
            f"got {int(crow[at + 1])}; pointers must not decrease"
        )
    if int(crow[-1]) > entries:
        raise PatternError(
            f"{name}[{segments}]: expected at most {entries} (the places there are), "
            f"got {int(crow[-1])}; the index tensors are too short or the pointer is wrong"
        )


def check_columns(name: str, block_row: Tensor, col: Tensor, block_cols: int) -> None:
    """Check block columns `col` [nnzb]: in range and strictly increasing within each row."""
    at = first_index((col < 0) | (col >= block_cols))
    if at is not None:
        raise PatternError(
            f"{name}[{at}]: expected a block column from 0 to {block_cols - 1}, got {int(col[at])}"
        )
    at = first_index((col[1:] <= col[:-1]) & (block_row[1:] == block_row[:-1]))
    if at is not None:
        here, before, row = int(col[at + 1]), int(col[at]), int(block_row[at + 1])
        what = "a duplicate" if here == before else "not sorted"
        raise PatternError(
            f"{name}[{at + 1}]: block column {here} after {before} in block row {row} is {what}; "
            f"expected strictly increasing columns in each row, sort and merge them"
        )


def check_index_tensors(arrays: dict[str, Tensor]) -> None:
    """Check dtype, shape, order and device of the five index tensors together."""
    device = arrays["crow_indices"].device
    capacity = arrays["col_indices"].numel()
    for name, array in arrays.items():
        check_tensor(name, array, 1)
        if array.dtype != torch.int32:
            raise PatternError(
                f"{name}: expected torch.int32, got {array.dtype}; pass {name}.to(torch.int32)"
            )
        if not array.is_contiguous():
            raise PatternError(f"{name}: expected a contiguous tensor, got stride {array.stride()}")
        if array.device != device:
            raise PatternError(
                f"{name}: expected device {device} as crow_indices, got {array.device}"
            )
        if name in ("t_row", "t_perm") and array.numel() != capacity:
            raise PatternError(
                f"{name}: expected {capacity} entries as col_indices has, got {array.numel()}"
            )
    if not 1 <= capacity <= INT32_MAX:
        raise PatternError(f"col_indices: expected 1 to {INT32_MAX} places, got {capacity}")


def check_equal(name: str, got: Tensor, expected: Tensor, why: str) -> None:
    """Check that index array `got` equals `expected`; PatternError names the first difference."""
    if got.numel() != expected.numel():
        raise PatternError(f"{name}: expected {expected.numel()} entries, got {got.numel()}")
    at = first_index(got != expected)
    if at is not None:
        raise PatternError(f"{name}[{at}]: expected {int(expected[at])}, got {int(got[at])}; {why}")
