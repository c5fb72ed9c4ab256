"""Triton kernel of dropout: a mask that is a function of a seed and of the place in memory.

Philox4x32 with 7 rounds (Salmon et al., SC'11), in the order of csrc/cpu/dropout.cpp: 64
consecutive counters serve 256 elements; words 0 and 1 of the counters lie in turn in the first half
of these, words 2 and 3 in the second.
"""

# No `from __future__ import annotations`: the interpreter of Triton 3.6 wants real annotations.
import triton
import triton.language as tl


@triton.jit
def dropout(
    y,  # [count], in the order of memory
    x,  # [count], likewise; any float type
    seed,  # int64 []: read here, so that nobody waits for it and a captured graph draws anew
    count,
    least,  # int32: a word, read as signed, keeps its element if it is at least this
    scale,  # 1 / (1 - p), or 0
    COUNTERS: tl.constexpr,  # per program, a multiple of 64
):
    first = tl.program_id(0).to(tl.int64) * COUNTERS
    counter = first + tl.arange(0, COUNTERS)
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    none = tl.zeros((COUNTERS,), tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), low, high, none, none, 7)
    place = tl.arange(0, 2 * COUNTERS)
    at = first * 4 + (place // 128) * 256 + place % 128
    _scale_kept(y, x, at, count, tl.interleave(w0, w1), least, scale)
    _scale_kept(y, x, at + 128, count, tl.interleave(w2, w3), least, scale)


@triton.jit
def _scale_kept(y, x, at, count, word, least, scale):
    """A product, not a selection: as in torch, NaN and infinity become NaN where dropped."""
    noise = tl.where(word.to(tl.int32, bitcast=True) >= least, scale, 0.0)
    inside = at < count
    found = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, (found * noise).to(y.dtype.element_ty), mask=inside)
