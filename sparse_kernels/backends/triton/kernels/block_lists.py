"""Triton kernel that orders a convolution's columns for the input gradient.

The pattern's transposed index is sorted by (tap, channel block). The gradient of one channel block
gathers over all taps, so its blocks must stand together, tap after tap: one list per group, phase
of the stride and channel block. The kernel runs in every call (a few microseconds) instead of at a
pattern change, so that a captured CUDA graph follows patterns that are rewritten in place.
"""

# No `from __future__ import annotations`: the interpreter of Triton 3.6 wants real annotations.
import triton
import triton.language as tl


@triton.jit
def lower_bound(array, low, high, key, STEPS: tl.constexpr):
    """First position in [low, high) whose entry of the sorted array is not below key."""
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        open_ = low < high
        below = tl.load(array + middle, mask=open_, other=0) < key
        low = tl.where(open_ & below, middle + 1, low)
        high = tl.where(open_ & (below == 0), middle, high)
    return low


@triton.jit
def column_span(t_crow, t_row, column, mask, group, row_blocks, SEARCH: tl.constexpr):
    """Items [low, high) of a block column within the rows of a group."""
    low = tl.load(t_crow + column, mask=mask, other=0)
    high = tl.load(t_crow + column + 1, mask=mask, other=0)
    if SEARCH > 0:
        above = lower_bound(t_row, low, high, (group + 1) * row_blocks, SEARCH)
        low = lower_bound(t_row, low, high, group * row_blocks, SEARCH)
        high = above
    return low, high


@triton.jit
def list_key(column, col_blocks, window):
    """Order of a block column's list within its group: phase, then channel block."""
    taps_w, stride_h, stride_w, dilation_h, dilation_w, pad_h, pad_w = window
    tap = column // col_blocks
    # (stride - 1) * pad is -pad modulo the stride, and never negative.
    phase_h = ((tap // taps_w) * dilation_h + (stride_h - 1) * pad_h) % stride_h
    phase_w = ((tap % taps_w) * dilation_w + (stride_w - 1) * pad_w) % stride_w
    return (phase_h * stride_w + phase_w) * col_blocks + column % col_blocks


@triton.jit
def column_lists(
    pointer,  # int32 [lists + 1]
    source,  # int32 [capacity]: tap * row_blocks + block row within the group
    place,  # int32 [capacity]: index into values
    crow,
    t_crow,
    t_row,
    t_perm,
    columns,  # taps * col_blocks
    col_blocks,  # blocks of the input's channels per group
    row_blocks,  # blocks of the output's channels per group
    groups,
    phases,  # stride_h * stride_w
    taps_w,
    stride_h,
    stride_w,
    dilation_h,
    dilation_w,
    pad_h,
    pad_w,
    SEARCH: tl.constexpr,  # bisections that find a group in a column; 0 for one group
    CHUNK: tl.constexpr,
):
    """Programs up to groups * columns copy a column each; the rest write a list's start each."""
    window = (taps_w, stride_h, stride_w, dilation_h, dilation_w, pad_h, pad_w)
    copies = tl.program_id(0) < groups * columns
    target = tl.program_id(0) - groups * columns
    group, column = tl.program_id(0) // columns, tl.program_id(0) % columns
    key = list_key(column, col_blocks, window)
    if target >= 0:
        group, column = target // (phases * col_blocks), 0
        key = target % (phases * col_blocks)
    at = tl.load(crow + group * row_blocks)
    length = 0
    for first in tl.range(0, columns, CHUNK):
        other = first + tl.arange(0, CHUNK)
        low, high = column_span(t_crow, t_row, other, other < columns, group, row_blocks, SEARCH)
        keys = list_key(other, col_blocks, window)
        before = (keys < key) | ((keys == key) & (other < column))
        at += tl.sum(tl.where(before, high - low, 0), axis=0)
        length += tl.sum(tl.where(keys == key, high - low, 0), axis=0)
    if copies:
        low, high = column_span(t_crow, t_row, column, copies, group, row_blocks, SEARCH)
        for first in tl.range(low, high, CHUNK):
            item = first + tl.arange(0, CHUNK)
            mask = item < high
            row = tl.load(t_row + item, mask=mask, other=0) - group * row_blocks
            tap = column // col_blocks
            tl.store(source + at + item - low, tap * row_blocks + row, mask=mask)
            stored = tl.load(t_perm + item, mask=mask, other=0)
            tl.store(place + at + item - low, stored, mask=mask)
    else:
        tl.store(pointer + target, at)
        if target == groups * phases * col_blocks - 1:
            tl.store(pointer + target + 1, at + length)
