"""The kernels of a pattern change against torch's operators on the CPU: equal to the last bit.

Through backends/cuda_pattern.py, with the emulated module for the native one. Every tensor that a
call may touch is registered: an access beside it, or a write to an input, is a fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from emulator import SEED, load
from torch import Tensor

from sparse_kernels._load import native_or_none
from sparse_kernels.backends import cuda_pattern as change
from sparse_kernels.pattern import SparsityPattern
from sparse_kernels.training import selection
from sparse_kernels.training.rewrite import locate

TILE = 4096  # kSelectTile of csrc/cuda/pattern_select.cuh


class Emulated:
    """The module in place of the native one; remembers what was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module = load()
        self.called: list[str] = []
        monkeypatch.setattr(change, "native", lambda: self)
        monkeypatch.setattr(change, "_place", lambda x: (0, 0))
        monkeypatch.setattr(change.torch, "empty", self.empty)
        self.inside = False

    _empty = staticmethod(torch.empty)

    def empty(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        """Outputs and workspaces: filled with nonsense, and registered as memory to write."""
        made = Emulated._empty(*args, **kwargs)
        if self.inside and made.numel():
            made.view(torch.uint8).fill_(0xEE)
            self.register(made, True, "an output or the workspace")
        return made

    def register(self, tensor: Tensor, writable: bool, name: str) -> None:
        if tensor.numel():
            size = tensor.numel() * tensor.element_size()
            self.module.register_memory(tensor.data_ptr(), size, writable, name)

    def __getattr__(self, name: str):  # type: ignore[no-untyped-def]
        self.called.append(name)
        return getattr(self.module, name)

    @contextmanager
    def memory(self, seed: int = SEED, inputs: list = [], outputs: list = []) -> Iterator[None]:  # noqa: B006
        self.module.forget_memory()
        self.module.set_seed(seed)
        for i, tensor in enumerate(inputs):
            self.register(tensor, False, f"input {i}")
        for i, tensor in enumerate(outputs):
            self.register(tensor, True, f"output {i}")
        self.inside = True
        try:
            yield
        finally:
            self.inside = False
            self.module.forget_memory()


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Emulated:
    return Emulated(monkeypatch)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- selection ------------------------------------------------------------------------------------


def scores_of(kind: str, n: int, draw: torch.Generator, dtype: torch.dtype) -> Tensor:
    drawn = torch.randn(n, generator=draw, dtype=dtype)
    if kind == "ties":
        return (drawn * 2).round()  # both zeros among them
    if kind == "equal":
        return torch.full((n,), 0.25, dtype=dtype)
    if kind == "growth":  # as signals give them: >= 0, many 0, -1 where a block stays
        drawn = drawn.abs() * (torch.rand(n, generator=draw) < 0.6)
        drawn[torch.rand(n, generator=draw) < 0.3] = -1.0
    if kind == "close":  # they differ in their last digits only
        return 1 + drawn * torch.finfo(dtype).eps * 40
    if kind == "wide":
        return drawn * torch.logspace(-30, 30, n, dtype=dtype)
    return drawn


SIZES = {
    "small": [1, 0, 33, 300, 31, 257],
    "tiles": [TILE, TILE + 1, 2 * TILE + 77, 5, TILE - 1],
}
KINDS = ("random", "ties", "equal", "growth", "close", "wide")


def counts_of(which: str, sizes: list[int], draw: torch.Generator) -> list[int]:
    if which in ("none", "all"):
        return [0 if which == "none" else n for n in sizes]
    return [int(torch.randint(0, n + 1, (), generator=draw)) for n in sizes]


def selection_cases() -> list:
    cases = [("small", k, "some", torch.float32) for k in KINDS]
    cases += [("small", k, "some", torch.float64) for k in ("ties", "close", "growth")]
    cases += [("small", "random", which, torch.float32) for which in ("none", "all")]
    cases += [("tiles", k, "some", torch.float32) for k in ("ties", "growth")]
    cases += [("tiles", "close", "some", torch.float64)]
    return cases


@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
@pytest.mark.parametrize(
    "case", selection_cases(), ids=lambda c: f"{c[0]}-{c[1]}-{c[2]}-{str(c[3])[6:]}"
)
def test_select(case: tuple, largest: bool, emulated: Emulated) -> None:
    which, kind, count, dtype = case
    draw = generator(7)
    sizes = SIZES[which]
    scores = [scores_of(kind, n, draw, dtype) for n in sizes]
    counts = counts_of(count, sizes, draw)
    with emulated.memory(inputs=scores):
        masks = change.select_mask(scores, counts, largest)
        places = change.select_places(scores, counts, largest)
    for s, k, mask, place in zip(scores, counts, masks, places, strict=True):
        if largest:
            expected = selection.largest_indices(s, k)
        else:
            expected = selection.select_smallest(s, k).nonzero().flatten()
        assert torch.equal(place, expected)
        assert torch.equal(mask.nonzero().flatten(), expected)
    assert emulated.called == ["cuda_select_top_k"] * 2


@pytest.mark.parametrize("seed", range(3))
def test_select_does_not_depend_on_the_order_of_threads(seed: int, emulated: Emulated) -> None:
    scores = [scores_of("ties", TILE + 9, generator(1), torch.float32)]
    with emulated.memory(seed=seed, inputs=scores):
        places = change.select_places(scores, [TILE // 3], True)
    assert torch.equal(places[0], selection.largest_indices(scores[0], TILE // 3))


def test_one_layer_made_of_all_is_a_selection_over_all_layers(emulated: Emulated) -> None:
    """Global pruning: concatenated layers, ties to the first of them."""
    layers = [scores_of("ties", n, generator(n), torch.float32) for n in (50, 0, 70)]
    joined = torch.cat(layers)
    with emulated.memory(inputs=[joined]):
        mask = change.select_mask([joined], [41], False)[0]
    assert torch.equal(mask, selection.select_smallest(joined, 41))


# -- keys -----------------------------------------------------------------------------------------


def drawn_keys(blocks: int, count: int, draw: torch.Generator) -> Tensor:
    return torch.randperm(blocks, generator=draw)[:count].sort().values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("size", ["small", "tiles"])
def test_keep_and_merge(size: str, dtype: torch.dtype, emulated: Emulated) -> None:
    draw = generator(3)
    sizes = [0, 1, 40, 333, 5] if size == "small" else [TILE + 50, 2, 2 * TILE]
    keys = [drawn_keys(3 * n + 1, n, draw) for n in sizes]
    pruned = [torch.rand(n, generator=draw) < 0.4 for n in sizes]
    pruned[-1][:] = True  # a layer that keeps nothing
    scores: list[Tensor | None] = [torch.rand(3 * n + 1, generator=draw).to(dtype) for n in sizes]
    scores[1] = None
    counts = [int((~p).sum()) for p in pruned]
    before = [None if s is None else s.clone() for s in scores]
    with emulated.memory(inputs=[*keys, *pruned], outputs=[s for s in scores if s is not None]):
        kept = change.keep_blocks(pruned, keys, counts, scores)
    for k, p, found, s, b in zip(keys, pruned, kept, scores, before, strict=True):
        assert torch.equal(found, k[~p])
        if s is not None and b is not None:
            b[k[~p]] = -1.0
            assert torch.equal(s, b)
    grown = [k[p] for k, p in zip(keys, pruned, strict=True)]
    with emulated.memory(inputs=[*kept, *grown]):
        merged = change.merge_keys(kept, grown)
    for k, found in zip(keys, merged, strict=True):
        assert torch.equal(found, k)


# -- index arrays ---------------------------------------------------------------------------------


def patterns() -> list[tuple[SparsityPattern, Tensor]]:
    """Patterns with spare capacity and the keys that they shall get."""
    draw = generator(11)
    shapes = [
        ((37, 53), (1, 1), 1, 0.3),
        ((64, 40), (4, 1), 1, 0.4),
        ((66, 40), (32, 1), 1, 0.5),  # the last block row is partial
        ((30, 45), (2, 1), 9, 0.2),  # a convolution: 9 taps
        ((8, 5), (1, 1), 1, 1.0),  # full
        ((9, 7), (1, 1), 1, 0.0),  # empty
        ((5, 3000), (1, 1), 1, 0.01),  # empty rows and columns, more than one tile
        ((1, 1), (1, 1), 1, 1.0),
        ((2500, 3), (1, 1), 1, 0.5),
    ]
    made = []
    for shape, block, taps, density in shapes:
        grid = SparsityPattern(shape, block, 1, taps)
        blocks = grid.block_rows * grid.block_cols
        keys = drawn_keys(blocks, round(density * blocks), draw)
        if shape == (37, 53):
            keys = keys[(keys < 3 * 53) | (keys >= 9 * 53)]  # empty rows
        capacity = max(1, keys.numel() + (blocks % 5))
        made.append((SparsityPattern(shape, block, 1, taps, capacity=capacity), keys))
    return made


def test_index_arrays_of_all_layers_at_once(emulated: Emulated) -> None:
    layers = patterns()
    for pattern, _ in layers:
        for array in pattern.tensors():
            array.fill_(77)  # what is not written shows
    keys = [k for _, k in layers]
    arrays = [array for p, _ in layers for array in p.tensors()]
    with emulated.memory(inputs=keys, outputs=arrays):
        versions = [array._version for array in arrays]
        change.build_index([p for p, _ in layers], keys)
    # Caches of what is made of a pattern (backends/triton/operands.py) go by versions.
    assert all(a._version > v for a, v in zip(arrays, versions, strict=True))
    for pattern, k in layers:
        expected = SparsityPattern.from_keys(
            k, pattern.shape, pattern.block, 1, pattern.col_parts, capacity=pattern.capacity
        )
        for mine, theirs in zip(pattern.tensors(), expected.tensors(), strict=True):
            assert torch.equal(mine, theirs), pattern.shape


# -- what moves with the keys ---------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [True, False], ids=["in-place", "to-new-tensors"])
def test_values_and_any_number_of_states_move(inplace: bool, emulated: Emulated) -> None:
    draw = generator(5)
    cases = [  # block, old, new, capacity, dtype
        ((1, 1), 40, 60, 70, torch.float32),
        ((4, 1), 300, 250, 300, torch.float32),
        ((32, 1), 70, 70, 70, torch.bfloat16),
        ((1, 1), 1111, 1300, 1400, torch.bfloat16),  # 2-byte blocks
        ((3, 1), 50, 60, 64, torch.float16),
        ((2, 1), 9, 5, 12, torch.float64),
        ((1, 1), 0, 6, 8, torch.float32),
        ((1, 1), 6, 0, 8, torch.float32),
        ((16, 16), 5, 7, 9, torch.float32),
    ]
    old = [drawn_keys(4 * max(n, m), n, draw) for _, n, m, *_ in cases]
    new = [drawn_keys(4 * max(n, m), m, draw) for _, n, m, *_ in cases]
    for o, n in zip(old, new, strict=True):  # most blocks survive
        half = min(o.numel(), n.numel()) // 2
        n[:half] = o[:half]
    new = [torch.cat([n, torch.arange(n.numel() * 9)]).unique()[: n.numel()] for n in new]
    with emulated.memory(inputs=[*old, *new]):
        sources = change.locate_blocks(old, new)
    for o, n, source in zip(old, new, sources, strict=True):
        index, there = locate(o, n)
        assert torch.equal(source.long(), torch.where(there, index, -1))
    moves, expected, inputs, outputs = [], [], list(sources), []
    for state in range(3):
        for (block, _, _, capacity, dtype), o, n, source in zip(
            cases, old, new, sources, strict=True
        ):
            before = torch.randn(capacity, *block, generator=draw).to(dtype)
            start = torch.randn(n.numel(), *block, generator=draw).to(dtype) if state == 1 else None
            to = before if inplace else torch.full_like(before, 5)
            index, there = locate(o, n)
            content = torch.zeros(capacity, *block, dtype=dtype)
            if n.numel():
                grown = torch.zeros((), dtype=dtype) if start is None else start
                content[: n.numel()] = torch.where(there[:, None, None], before[index], grown)
            expected.append(content)
            moves.append(change.Move(before, to, source, start))
            inputs += [t for t in (start, None if inplace else before) if t is not None]
            outputs.append(to)
    with emulated.memory(inputs=inputs, outputs=outputs):
        versions = [to._version for to in outputs]
        change.move_blocks(moves)
    assert all(to._version > v for to, v in zip(outputs, versions, strict=True))
    for content, to in zip(expected, outputs, strict=True):
        assert torch.equal(to.view(torch.uint8), content.view(torch.uint8))


# -- the contract of the launchers ----------------------------------------------------------------


def test_a_workspace_that_is_too_small_or_misaligned_is_refused() -> None:
    module = load()
    words = [64, 100, 5, 64, 0]
    wanted = module.cuda_select_top_k(words, True, 4, 0, 0, 0, 0)
    assert wanted > 2048 * 4
    with pytest.raises(
        ValueError,
        match=r"^select_top_k \(layers 1, items 100, device 0\): expected a workspace of at least "
        rf"{wanted} bytes, got {wanted - 1}",
    ):
        module.cuda_select_top_k(words, True, 4, 64, wanted - 1, 0, 0)
    with pytest.raises(ValueError, match="aligned to 16 bytes"):
        module.cuda_select_top_k(words, True, 4, 68, wanted, 0, 0)


def test_wrong_sizes_are_refused_before_anything_is_queued() -> None:
    module = load()
    with pytest.raises(ValueError, match=r"select_top_k .*: expected a count from 0"):
        module.cuda_select_top_k([64, 100, 101, 64, 0], True, 4, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="score_bytes must be 4"):
        module.cuda_select_top_k([64, 100, 5, 64, 0], True, 2, 0, 0, 0, 0)
    with pytest.raises(ValueError, match="described by 5 integers each, got 4"):
        module.cuda_select_top_k([64, 100, 5, 64], True, 4, 0, 0, 0, 0)
    with pytest.raises(
        ValueError, match=r"build_index .*: expected a count from 0 to the capacity"
    ):
        module.cuda_build_index([64, 9, 3, 3, 8, 64, 64, 64, 64, 64], 0, 0, 0, 0)
    with pytest.raises(ValueError, match=r"move_blocks .*: expected blocks of 2 bytes"):
        module.cuda_move_blocks([64, 64, 0, 64, 1, 2, 3], 0, 0, 0, 0)
    with pytest.raises(ValueError, match=r"merge_keys .*: expected 0 to 2"):
        module.cuda_merge_keys([64, -1, 64, 3, 64], 0, 0, 0, 0)


def test_a_device_that_is_not_there_is_named_with_kernel_and_shape() -> None:
    with pytest.raises(
        RuntimeError,
        match=r"^move_blocks \(layers 1, blocks 5, device 9\): cudaSetDevice failed: invalid",
    ):
        load().cuda_move_blocks([64, 64, 0, 64, 5, 8, 4], 0, 0, 9, 0)


def test_the_callers_device_stays_current(emulated: Emulated, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(change, "_place", lambda x: (1, 0))
    scores = [torch.rand(40)]
    with emulated.memory(inputs=scores):
        change.select_mask(scores, [3], True)
    assert load().current_device() == 0


def test_no_layers_and_empty_layers_need_no_work(emulated: Emulated) -> None:
    assert change.select_mask([], [], True) == []
    assert emulated.called == []
    nothing = [torch.zeros(0), torch.zeros(0)]
    with emulated.memory():
        assert [m.numel() for m in change.select_mask(nothing, [0, 0], True)] == [0, 0]
        change.move_blocks([])


def test_scores_of_two_types_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="all float32 or all float64"):
        change.select_mask([torch.zeros(2), torch.zeros(2).double()], [1, 1], True)
    assert not change.serves([torch.zeros(2)])


def test_a_build_without_cuda_says_so() -> None:
    module = native_or_none()
    if module is None or module.build_info()["cuda"]:
        pytest.skip("needs the native module, built without CUDA")
    with pytest.raises(RuntimeError, match="^merge_keys: this build has no CUDA kernels"):
        module.cuda_merge_keys([], 0, 0, 0, 0)
