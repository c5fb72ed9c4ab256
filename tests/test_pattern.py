"""SparsityPattern: construction, exact counts, exchange with torch, rewriting, validation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CONV_CASES, LINEAR_CASES, make_pattern

from sparse_kernels.pattern import PatternError, SparsityPattern

pytestmark = pytest.mark.filterwarnings("ignore:Sparse (CSR|BSR) tensor support:UserWarning")

CASES = [*LINEAR_CASES, *CONV_CASES]


def small(capacity: int | None = None) -> SparsityPattern:
    """[[x . x] [. . .] [. x x] [x . .]] over a 4 x 3 matrix."""
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 1], [1, 0, 0]], dtype=torch.bool)
    return SparsityPattern.from_mask(mask, capacity=capacity)


def test_arrays_by_hand() -> None:
    pattern = small(capacity=7)
    assert pattern.crow_indices.tolist() == [0, 2, 2, 4, 5]
    assert pattern.col_indices.tolist() == [0, 2, 1, 2, 0, 0, 0]
    assert pattern.t_crow.tolist() == [0, 2, 3, 5]
    assert pattern.t_row.tolist() == [0, 3, 2, 0, 2, 0, 0]
    assert pattern.t_perm.tolist() == [0, 4, 2, 1, 3, 0, 0]
    assert pattern.keys().tolist() == [0, 2, 7, 8, 9]
    assert (pattern.nnzb, pattern.nnz, pattern.numel, pattern.capacity) == (5, 5, 12, 7)
    assert pattern.density == 5 / 12
    assert all(array.dtype == torch.int32 for array in pattern.tensors())


def test_blocks_stop_at_segment_ends_by_hand() -> None:
    # Rows 0-2 and 3-5 are two segments; blocks of 2 rows leave a partial block at the end of each.
    mask = torch.zeros(6, 4, dtype=torch.bool)
    mask[2, 1] = mask[3, 3] = mask[5, 0] = True
    pattern = SparsityPattern.from_mask(mask, block=(2, 2), row_parts=2, col_parts=2)
    assert (pattern.block_rows, pattern.block_cols) == (4, 2)
    assert pattern.keys().tolist() == [2, 5, 6]
    assert pattern.element_counts().tolist() == [2, 4, 2]
    assert pattern.nnz == 8
    stored = torch.zeros(6, 4, dtype=torch.bool)
    stored[2, :2] = stored[3:5, 2:] = stored[5, :2] = True
    assert torch.equal(pattern.mask(), stored)
    inside = pattern.inside_mask()
    assert inside is not None
    assert inside.tolist() == [
        [[True] * 2, [False] * 2],
        [[True] * 2] * 2,
        [[True] * 2, [False] * 2],
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{type(case).__name__}-{case.id}")
def test_consistent(case: Any, generator: torch.Generator) -> None:
    """Counts, masks, values and every way of construction agree."""
    pattern = make_pattern(case, generator)
    pattern.validate()
    block, row_parts, col_parts = pattern.block, pattern.row_parts, pattern.col_parts
    grid = (pattern.shape, block, row_parts, col_parts)
    mask = pattern.mask()
    assert int(mask.sum()) == pattern.nnz == int(pattern.element_counts().sum())
    assert int(pattern.block_mask().sum()) == pattern.nnzb
    assert torch.equal(pattern.block_mask().flatten().nonzero().flatten(), pattern.keys())
    assert SparsityPattern.from_mask(mask, block, row_parts, col_parts) == pattern
    assert SparsityPattern.from_keys(pattern.keys(), *grid) == pattern
    for dtype in (torch.int32, torch.int64):
        crow, col = pattern.crow_indices.to(dtype), pattern.col_indices.to(dtype)
        assert SparsityPattern.from_csr(crow, col, *grid) == pattern

    dense = torch.randn(pattern.shape)
    values = pattern.compress(dense)
    assert values.shape == (pattern.capacity, *block)
    assert not values[pattern.nnzb :].any()
    assert torch.equal(pattern.expand(values), dense * mask)
    inside = pattern.inside_mask()
    if inside is not None:
        assert not values[: pattern.nnzb][~inside].any()
        assert torch.equal(inside.sum((1, 2)), pattern.element_counts())
    # The transposed order visits each stored block once, at its own row.
    perm = pattern.t_perm[: pattern.nnzb].long()
    assert torch.equal(perm.sort().values, torch.arange(pattern.nnzb))
    assert torch.equal(pattern.t_row[: pattern.nnzb].long(), pattern.block_row_indices()[perm])


def test_entries_outside_of_the_matrix_are_ignored() -> None:
    pattern = SparsityPattern.full((5, 5), block=(2, 3))
    values = torch.ones(pattern.capacity, 2, 3)
    assert torch.equal(pattern.expand(values), torch.ones(5, 5))


@pytest.mark.parametrize("block", [(1, 1), (2, 3), (4, 1)])
@pytest.mark.parametrize("density", [0.0, 1e-9, 0.03, 0.5, 0.77, 1.0])
def test_random_is_exact(block: tuple[int, int], density: float) -> None:
    pattern = SparsityPattern.random((41, 30), density, block=block)
    blocks = pattern.block_rows * pattern.block_cols
    assert pattern.nnzb == max(round(density * blocks), 1 if density else 0)
    assert pattern.capacity == max(1, pattern.nnzb)
    pattern.validate()


def test_random_is_deterministic_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    first, second, other = (
        SparsityPattern.random((20, 30), 0.3, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert first == second
    assert first != other
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("nnzb", [1, 3, 4, 6])
def test_random_is_uniform(nnzb: int, generator: torch.Generator) -> None:
    draws = 500
    counts = torch.zeros(7)
    pairs = torch.zeros(7, 7)
    for _ in range(draws):
        mask = SparsityPattern.random((1, 7), nnzb=nnzb, generator=generator).mask()[0].float()
        counts += mask
        pairs += mask[:, None] * mask
    assert int(counts.sum()) == draws * nnzb
    # Six standard deviations of a binomial count; pairs too, or runs would pass.
    for got, share in (
        (counts, nnzb / 7),
        (pairs[~torch.eye(7, dtype=torch.bool)], nnzb * (nnzb - 1) / 42),
    ):
        bound = 6 * (draws * share * (1 - share)) ** 0.5
        assert float((got - draws * share).abs().max()) <= bound


def test_full() -> None:
    pattern = SparsityPattern.full((6, 9), (4, 2), row_parts=1, col_parts=3, capacity=40)
    assert (pattern.nnzb, pattern.nnz, pattern.density, pattern.capacity) == (12, 54, 1.0, 40)
    pattern.validate()


def test_from_indices_shares() -> None:
    pattern = small()
    shared = SparsityPattern.from_indices(*pattern.tensors(), pattern.shape)
    assert shared == pattern
    assert shared.nnzb == 5
    for mine, theirs in zip(shared.tensors(), pattern.tensors(), strict=True):
        assert mine is theirs


def test_clone_and_to() -> None:
    pattern = small(capacity=6)
    copy = pattern.clone()
    assert copy == pattern and copy.capacity == 6
    copy.rewrite_(torch.tensor([3]))
    assert copy != pattern
    pattern.validate()
    assert pattern.to("cpu") is pattern
    assert pattern.to("meta").device.type == "meta"


def test_equality() -> None:
    assert small(5) == small(9)
    assert small() != SparsityPattern.full((4, 3))
    keys = small().keys()
    assert small() != SparsityPattern.from_keys(keys, (4, 3), col_parts=3)
    assert small() != "pattern"
    with pytest.raises(TypeError, match="unhashable"):
        hash(small())
    assert "nnzb=5" in repr(small()) and "shape=(4, 3)" in repr(small())


# -- exchange with torch ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{type(case).__name__}-{case.id}")
def test_to_torch_and_back(case: Any, generator: torch.Generator) -> None:
    pattern = make_pattern(case, generator)
    values = pattern.compress(torch.randn(pattern.shape, generator=generator))
    if pattern.inside_mask() is not None:
        with pytest.raises(ValueError, match=r"to_torch: .*blocks that divide.*expand"):
            pattern.to_torch(values)
        return
    exported = pattern.to_torch(values)
    expected = torch.sparse_csr if pattern.block == (1, 1) else torch.sparse_bsr
    assert exported.layout == expected
    assert torch.equal(exported.to_dense(), pattern.expand(values))
    back, back_values = SparsityPattern.from_torch(exported)
    back.validate()
    assert torch.equal(back.keys(), pattern.keys())
    assert torch.equal(back.expand(back_values), pattern.expand(values))


@pytest.mark.parametrize("block", [(1, 1), (2, 3)])
def test_exchange_shares_memory(block: tuple[int, int]) -> None:
    pattern = SparsityPattern.random((8, 9), 0.5, block=block, capacity=100)
    values = pattern.compress(torch.randn(8, 9)).requires_grad_()
    exported = pattern.to_torch(values)
    assert exported.values().data_ptr() == values.data_ptr()
    assert exported.crow_indices().data_ptr() == pattern.crow_indices.data_ptr()
    assert exported.col_indices().data_ptr() == pattern.col_indices.data_ptr()
    assert not exported.requires_grad
    back, back_values = SparsityPattern.from_torch(exported)
    assert back_values.data_ptr() == values.data_ptr()
    assert back.col_indices.data_ptr() == pattern.col_indices.data_ptr()
    assert back.crow_indices.data_ptr() == pattern.crow_indices.data_ptr()
    back.validate()


def test_from_torch_copies_int64_indices() -> None:
    tensor = torch.randn(5, 7).relu().to_sparse_csr()
    pattern, values = SparsityPattern.from_torch(tensor)
    pattern.validate()
    assert values.data_ptr() == tensor.values().data_ptr()
    assert torch.equal(pattern.expand(values), tensor.to_dense())


def test_from_torch_empty() -> None:
    pattern, values = SparsityPattern.from_torch(torch.zeros(4, 6).to_sparse_bsr((2, 3)))
    assert pattern.nnzb == 0 and values.shape == (1, 2, 3)
    pattern.validate()


def test_from_torch_refuses() -> None:
    with pytest.raises(TypeError, match=r"from_torch: expected a torch\.sparse_csr"):
        SparsityPattern.from_torch(torch.zeros(3, 3))
    with pytest.raises(TypeError, match="got list"):
        SparsityPattern.from_torch([1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a matrix of scalars"):
        SparsityPattern.from_torch(torch.ones(2, 3, 3).to_sparse_csr())


# -- rewriting in place ----------------------------------------------------------------------------


@pytest.mark.parametrize("block", [(1, 1), (4, 1), (3, 5)])
def test_rewrite_in_place(block: tuple[int, int], generator: torch.Generator) -> None:
    grid = ((36, 30), block, 2, 3)
    pattern = SparsityPattern.random(
        grid[0], 0.5, None, *grid[1:], generator=generator, capacity=200 if block == (3, 5) else 600
    )
    pointers = [array.data_ptr() for array in pattern.tensors()]
    objects = pattern.tensors()
    for density in (0.3, 0.0, 0.5, 0.01):
        wanted = SparsityPattern.random(grid[0], density, None, *grid[1:], generator=generator)
        assert pattern.rewrite_(wanted.keys()) is False
        assert pattern == wanted and pattern.nnz == wanted.nnz
        pattern.validate()  # tails are zero again, the transposed index belongs
        assert [array.data_ptr() for array in pattern.tensors()] == pointers
        assert all(new is old for new, old in zip(pattern.tensors(), objects, strict=True))


def test_rewrite_grows_geometrically() -> None:
    pattern = SparsityPattern.random((20, 20), nnzb=100)
    assert pattern.rewrite_(torch.arange(101)) is True
    assert pattern.capacity == 125
    assert pattern.rewrite_(torch.arange(125)) is False
    assert pattern.rewrite_(torch.arange(400)) is True
    assert pattern.capacity == 400
    assert pattern == SparsityPattern.full((20, 20))
    pattern.validate()


def test_failed_rewrite_changes_nothing() -> None:
    pattern, before = small(), small()
    with pytest.raises(PatternError, match=r"keys\[1\]"):
        pattern.rewrite_(torch.tensor([5, 4]))
    assert pattern == before
    pattern.validate()


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "at", "value", "message"),
    [
        ("crow_indices", 0, 1, r"crow_indices\[0\]: expected 0, got 1"),
        ("crow_indices", 2, 1, r"crow_indices\[2\]: expected at least .* got 1"),
        ("crow_indices", 4, 9, r"crow_indices\[4\]: expected at most 7"),
        ("col_indices", 2, 3, r"col_indices\[2\]: expected a block column from 0 to 2, got 3"),
        ("col_indices", 2, -1, r"col_indices\[2\]: .* got -1"),
        ("col_indices", 3, 1, r"col_indices\[3\]: .* duplicate"),
        ("col_indices", 3, 0, r"col_indices\[3\]: .* not sorted"),
        ("col_indices", 6, 2, r"col_indices\[6\]: expected 0 past the 5 stored blocks, got 2"),
        ("t_crow", 1, 1, r"t_crow\[1\]: expected 2, got 1; the transposed index"),
        ("t_row", 1, 0, r"t_row\[1\]: expected 3, got 0; the transposed index"),
        ("t_perm", 4, 1, r"t_perm\[4\]: expected 3, got 1; the transposed index"),
        ("t_perm", 5, 1, r"t_perm\[5\]: expected 0 past"),
    ],
)
def test_validate_names_the_place(name: str, at: int, value: int, message: str) -> None:
    pattern = small(capacity=7)
    getattr(pattern, name)[at] = value
    with pytest.raises(PatternError, match=message):
        pattern.validate()


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("crow_indices", torch.zeros(5, dtype=torch.int64), "crow_indices: expected torch.int32"),
        ("crow_indices", torch.zeros(4, dtype=torch.int32), "crow_indices: expected 5 entries"),
        ("col_indices", torch.zeros(14, dtype=torch.int32)[::2], "col_indices: .* contiguous"),
        ("t_row", torch.zeros(6, dtype=torch.int32), "t_row: expected 7 entries"),
        ("t_crow", torch.zeros(9, dtype=torch.int32), "t_crow: expected 4 entries, got 9"),
        ("t_perm", torch.zeros(7, 1, dtype=torch.int32), "t_perm: expected 1 dimension"),
        ("t_perm", torch.zeros(7, dtype=torch.int32, device="meta"), "t_perm: expected device cpu"),
    ],
)
def test_validate_checks_the_tensors(name: str, array: torch.Tensor, message: str) -> None:
    pattern = small(capacity=7)
    setattr(pattern, name, array)
    with pytest.raises(PatternError, match=message):
        pattern.validate()


KEYS = torch.tensor([0, 2, 7])


@pytest.mark.parametrize(
    ("error", "message", "build"),
    [
        (ValueError, r"shape\[0\]: expected 1 to", lambda P: P.full((0, 3))),
        (TypeError, r"shape\[1\]: expected an integer", lambda P: P.full((3, 2.5))),
        (TypeError, "shape: expected a pair", lambda P: P.full(3)),
        (ValueError, r"shape\[1\]: .*int32", lambda P: P.full((3, 2**31))),
        (ValueError, "number of blocks: .*int32", lambda P: P.full((2**16, 2**16))),
        (ValueError, r"block\[0\]: expected at most 4", lambda P: P.full((8, 8), (5, 1), 2)),
        (ValueError, r"block\[1\]: expected at most 2", lambda P: P.full((8, 8), (1, 3), 1, 4)),
        (
            ValueError,
            "row_parts: expected a divisor of rows = 8",
            lambda P: P.full((8, 8), (1, 1), 3),
        ),
        (TypeError, "col_parts: .*bool", lambda P: P.full((8, 8), col_parts=True)),
        (ValueError, "exactly one of density and nnzb", lambda P: P.random((3, 3))),
        (ValueError, "exactly one of density and nnzb", lambda P: P.random((3, 3), 0.5, 2)),
        (ValueError, "density: expected 0 to 1, got 90", lambda P: P.random((3, 3), 90)),
        (ValueError, "density: expected 0 to 1, got nan", lambda P: P.random((3, 3), float("nan"))),
        (TypeError, "density: expected a number", lambda P: P.random((3, 3), "0.5")),
        (ValueError, "nnzb: expected 0 to 9, got 10", lambda P: P.random((3, 3), nnzb=10)),
        (ValueError, "capacity: expected 3 to", lambda P: P.from_keys(KEYS, (4, 3), capacity=2)),
        (TypeError, "keys: expected dtype", lambda P: P.from_keys(KEYS.int(), (4, 3))),
        (TypeError, "keys: expected a torch.Tensor", lambda P: P.from_keys([1], (4, 3))),
        (PatternError, r"keys\[2\]: expected 0 to 5", lambda P: P.from_keys(KEYS, (2, 3))),
        (PatternError, r"keys\[1\]: .* duplicate", lambda P: P.from_keys(KEYS[[1, 1]], (4, 3))),
        (PatternError, r"keys\[1\]: .* smaller", lambda P: P.from_keys(KEYS.flip(0), (4, 3))),
        (TypeError, "mask: expected dtype torch.bool", lambda P: P.from_mask(torch.ones(2, 2))),
        (PatternError, "mask: expected 2 dim", lambda P: P.from_mask(torch.ones(2).bool())),
        (
            PatternError,
            r"block_mask: expected shape \(2, 4\)",
            lambda P: P.from_block_mask(torch.ones(4, 4).bool(), (4, 4), (2, 1)),
        ),
        (
            PatternError,
            r"crow_indices\[2\]: expected at most 3",
            lambda P: P.from_csr(torch.tensor([0, 2, 5]), KEYS, (2, 9)),
        ),
        (
            TypeError,
            "col_indices: expected an integer dtype",
            lambda P: P.from_csr(torch.tensor([0, 3]), KEYS.float(), (1, 9)),
        ),
    ],
)
def test_refusals(error: type[Exception], message: str, build: Any) -> None:
    with pytest.raises(error, match=message):
        build(SparsityPattern)


def test_compress_and_expand_refuse_other_shapes() -> None:
    pattern = small()
    with pytest.raises(ValueError, match=r"dense: expected shape \(4, 3\), got \(3, 4\)"):
        pattern.compress(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"values: expected shape \[5 or more, 1, 1\]"):
        pattern.expand(torch.zeros(4, 1, 1))
    with pytest.raises(ValueError, match="values and pattern do not belong together"):
        pattern.to_torch(torch.zeros(5, 2, 1))
