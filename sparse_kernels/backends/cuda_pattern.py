"""Pattern changes by the native CUDA kernels: all layers of a network in each call.

Functions over lists of tensors, one entry per layer, on one GPU and on its current stream. Sizes
are known to the host beforehand; nothing here waits for the device. Each equals the torch operators
that it stands for, to the last bit (tests/cuda_emulation/test_pattern_change.py). RuntimeError with
CUDA's message where a launch fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from sparse_kernels._load import native, native_or_none
from sparse_kernels.pattern import SparsityPattern

__all__ = [
    "Move",
    "build_index",
    "keep_blocks",
    "locate_blocks",
    "merge_keys",
    "move_blocks",
    "select_mask",
    "select_places",
    "serves",
    "takes_scores",
]

_SCORES = {torch.float32: 4, torch.float64: 8}


def serves(tensors: Sequence[Tensor]) -> bool:
    """Whether the kernels take these tensors: all on one CUDA device, and the kernels are built.

    Of subclasses (fake tensors, for one) nothing is known about their memory.
    """
    if not tensors or not _on_gpu(tensors[0]):
        return False
    if any(t.device != tensors[0].device or type(t) is not Tensor for t in tensors):
        return False
    module = native_or_none()
    return module is not None and bool(module.build_info()["cuda"])


def takes_scores(scores: Sequence[object]) -> TypeGuard[Sequence[Tensor]]:
    """Whether selection takes these scores: tensors, contiguous, all float32 or all float64,
    that are served; not the scores of a sample (training/scores.py).
    """
    found = [s for s in scores if isinstance(s, Tensor) and s.is_contiguous()]
    types = {s.dtype for s in found}
    served = len(found) == len(scores) and len(types) == 1 and types <= _SCORES.keys()
    return served and serves(found)


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


# -- selection ------------------------------------------------------------------------------------


def select_mask(scores: Sequence[Tensor], counts: Sequence[int], largest: bool) -> list[Tensor]:
    """Per layer bool [n], set at exactly counts[l] of the largest (or smallest) of scores[l] [n].

    Ties go to the lowest index; -0 equals 0; no NaN. float32 or float64.
    Raises ValueError unless 0 <= counts[l] <= n.
    """
    held = [s.contiguous() for s in scores]
    masks = [torch.empty(s.shape, dtype=torch.bool, device=s.device) for s in held]
    rows = [
        (s.data_ptr(), s.numel(), count, mask.data_ptr(), 0)
        for s, count, mask in zip(held, counts, masks, strict=True)
    ]
    _call("cuda_select_top_k", rows, held, largest, _score_bytes("select_mask", held))
    return masks


def select_places(scores: Sequence[Tensor], counts: Sequence[int], largest: bool) -> list[Tensor]:
    """As select_mask, but per layer int64 [counts[l]]: the chosen indices, ascending."""
    held = [s.contiguous() for s in scores]
    places = [_keys(count, s) for s, count in zip(held, counts, strict=True)]
    rows = [
        (s.data_ptr(), s.numel(), count, 0, place.data_ptr())
        for s, count, place in zip(held, counts, places, strict=True)
    ]
    _call("cuda_select_top_k", rows, held, largest, _score_bytes("select_places", held))
    return places


def keep_blocks(
    pruned: Sequence[Tensor],
    keys: Sequence[Tensor],
    counts: Sequence[int],
    scores: Sequence[Tensor | None],
) -> list[Tensor]:
    """Per layer the keys int64 [counts[l]] of the blocks that are not pruned, ascending.

    pruned: bool [n], exactly n - counts[l] of them set; keys: int64 [n]; scores: [blocks] or None
    per layer, contiguous, which get -1 at the keys that stay.
    """
    masks, held = [p.contiguous() for p in pruned], [k.contiguous() for k in keys]
    kept = [_keys(count, k) for k, count in zip(held, counts, strict=True)]
    there = [s for s in scores if s is not None]
    for s in there:
        if not s.is_contiguous():
            raise ValueError(f"keep_blocks: scores must be contiguous, got strides {s.stride()}")
    size = _score_bytes("keep_blocks", there) if there else 4
    rows = [
        (m.data_ptr(), k.data_ptr(), k.numel(), out.data_ptr(), count, _address(s))
        for m, k, out, count, s in zip(masks, held, kept, counts, scores, strict=True)
    ]
    _call("cuda_keep_blocks", rows, held, size)
    return kept


def merge_keys(kept: Sequence[Tensor], grown: Sequence[Tensor]) -> list[Tensor]:
    """Per layer all keys of two ascending int64 lists that have none in common, ascending."""
    one, other = [k.contiguous() for k in kept], [g.contiguous() for g in grown]
    keys = [_keys(k.numel() + g.numel(), k) for k, g in zip(one, other, strict=True)]
    rows = [
        (k.data_ptr(), k.numel(), g.data_ptr(), g.numel(), out.data_ptr())
        for k, g, out in zip(one, other, keys, strict=True)
    ]
    _call("cuda_merge_keys", rows, one)
    return keys


# -- patterns and what belongs to them ------------------------------------------------------------


def build_index(patterns: Sequence[SparsityPattern], keys: Sequence[Tensor]) -> None:
    """Write the five index arrays of each pattern, tail included, from its new keys.

    keys: int64 [nnzb] per pattern, strictly increasing, at most its capacity; not checked. The
    patterns' counts are the caller's business (SparsityPattern.rewrite_).
    """
    held = [k.contiguous() for k in keys]
    rows = []
    for pattern, k in zip(patterns, held, strict=True):
        sizes = (k.numel(), pattern.block_rows, pattern.block_cols, pattern.capacity)
        rows.append((k.data_ptr(), *sizes, *(t.data_ptr() for t in pattern.tensors())))
    _call("cuda_build_index", rows, held)
    _written(array for pattern in patterns for array in pattern.tensors())


def locate_blocks(old_keys: Sequence[Tensor], new_keys: Sequence[Tensor]) -> list[Tensor]:
    """Per layer int32 [new]: each new key's index among the old ones, -1 where it is not there.

    Both lists int64, strictly increasing.
    """
    old, new = [k.contiguous() for k in old_keys], [k.contiguous() for k in new_keys]
    sources = [torch.empty(k.shape, dtype=torch.int32, device=k.device) for k in new]
    rows = [
        (o.data_ptr(), o.numel(), n.data_ptr(), n.numel(), source.data_ptr())
        for o, n, source in zip(old, new, sources, strict=True)
    ]
    _call("cuda_locate_blocks", rows, old)
    return sources


class Move:
    """One tensor to be brought into a new order: `to` becomes `source`'s blocks of `old`.

    old [>= old blocks, bh, bw]; to [capacity, bh, bw], may be `old` itself; source int32 [new], as
    of locate_blocks; start [new, bh, bw], what new blocks get (None: zero). One dtype, contiguous.
    """

    __slots__ = ("old", "source", "start", "to")

    def __init__(self, old: Tensor, to: Tensor, source: Tensor, start: Tensor | None) -> None:
        for name, tensor in (("old", old), ("to", to)):
            if not tensor.is_contiguous() or tensor.dtype != to.dtype:
                raise ValueError(
                    f"move_blocks: {name} must be contiguous {to.dtype}, got {tensor.dtype} with "
                    f"strides {tensor.stride()}"
                )
        self.old, self.to, self.source = old, to, source
        self.start = None if start is None else start.to(to.dtype).contiguous()

    def row(self) -> tuple[int, ...]:
        """csrc/kernels_cuda_pattern.h's MoveTensor."""
        to = self.to
        block_bytes = to.shape[1] * to.shape[2] * to.element_size()
        addresses = (self.old.data_ptr(), to.data_ptr(), _address(self.start))
        return (*addresses, self.source.data_ptr(), self.source.numel(), to.shape[0], block_bytes)


def move_blocks(moves: Sequence[Move]) -> None:
    """Make every move; workspace for the content of all of them at once."""
    _call("cuda_move_blocks", [move.row() for move in moves], [move.to for move in moves])
    _written(move.to for move in moves)


# -- what a launcher takes ------------------------------------------------------------------------


def _place(x: Tensor) -> tuple[int, int]:
    """Ordinal of x's device and its current stream."""
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream


def _call(
    name: str, rows: Sequence[Sequence[int]], tensors: Sequence[Tensor], *options: int
) -> None:
    """Ask for the workspace, allocate it, and queue the work on the device of the tensors."""
    if not rows:
        return
    words = [word for row in rows for word in row]
    function: Callable[..., int] = getattr(native(), name)
    place = _place(tensors[0])
    size = function(words, *options, 0, 0, *place)
    workspace = torch.empty(size, dtype=torch.uint8, device=tensors[0].device)
    function(words, *options, workspace.data_ptr(), size, *place)


def _written(tensors: Iterable[Tensor]) -> None:
    """Tell torch what the kernels have written to: whoever kept a version must see another."""
    for tensor in tensors:
        torch.autograd.graph.increment_version(tensor)


def _keys(count: int, like: Tensor) -> Tensor:
    return torch.empty(count, dtype=torch.int64, device=like.device)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _score_bytes(what: str, scores: Sequence[Tensor]) -> int:
    """Bytes of a score; ValueError unless all are float32 or all are float64."""
    found = {s.dtype for s in scores}
    if len(found) > 1 or not found <= _SCORES.keys():
        raise ValueError(
            f"{what}: scores must be all float32 or all float64, got {sorted(map(str, found))}"
        )
    return _SCORES[scores[0].dtype] if scores else 4
