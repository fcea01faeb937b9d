# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Triton kernels for packed weights of 64 columns a panel: imported only where triton is installed.

A run of such a matrix (`formats.Packed`) is one 64-bit mask, read as two words of 32. A lane holds ``REACH`` columns
next to each other: it counts the bits below them once, which says where its values begin, and then walks over its own.
So values are read once, in order, and nothing is shared between threads before the sums are added at the end.

After: the bitmaps of SpInfer (Fan et al., EuroSys 2025) and the batch-1 products of MACKO (arXiv 2511.13061); neither's
code was used.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _ones(word):
    """Bits that are set in each uint32; LLVM knows this idiom and makes one instruction of it."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return (word * 0x01010101) >> 24


@triton.jit
def _lanes(start, words, row, panel, place, rows, panels, group):
    """For each row and lane: its own bits, the lowest first, and where its first value lies."""
    first = row // group * group
    height = tl.minimum(group, rows - first)  # the last group may be a short one
    run = (first * panels + row - first)[:, None] + panel[None, :] * height[:, None]
    there = (row < rows)[:, None] & (panel < panels)[None, :]
    half, shift = place // 32, place % 32
    low = tl.load(words + 2 * run, mask=there, other=0).to(tl.uint32, bitcast=True)
    own = tl.load(words + 2 * run + half[None, :], mask=there, other=0).to(tl.uint32, bitcast=True)
    below = ((1 << shift) - 1).to(tl.uint32)
    before = _ones(own & below[None, :]) + tl.where(half[None, :] > 0, _ones(low), 0)
    at = tl.load(start + run, mask=there, other=0) + before.to(tl.int32)
    return own >> shift.to(tl.uint32)[None, :], at


@triton.jit
def _finish(y, bias, total, row, rows, BIASED: tl.constexpr, ACTIVATION: tl.constexpr):
    """One token's sums: with bias and activation, stored."""
    if BIASED:
        total += tl.load(bias + row, mask=row < rows, other=0).to(tl.float32)
    if ACTIVATION == 1:
        total = tl.where(total < 0, 0.0, total)  # what is not a number stays
    tl.store(y + row, total.to(y.dtype.element_ty), mask=row < rows)


@triton.jit
def multiply(
    x, values, start, words, bias, y, rows, cols, group,
    TOKENS: tl.constexpr, BIASED: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, PANELS: tl.constexpr,
    REACH: tl.constexpr,
):  # fmt: skip
    """``y = x W^T + b`` for 1 to 4 tokens: a program has ``ROWS`` rows, and takes ``PANELS`` panels at a time.

    x is ``(TOKENS, cols)``, y ``(TOKENS, rows)``, both contiguous; products and sums are float32.
    """
    LANES: tl.constexpr = 64 // REACH
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, PANELS * LANES)
    place = lane % LANES * REACH
    panels = (cols + 63) // 64
    sum0 = tl.zeros((ROWS, PANELS * LANES), dtype=tl.float32)
    sum1, sum2, sum3 = sum0, sum0, sum0
    for step in range(0, panels, PANELS):
        panel = step + lane // LANES
        own, at = _lanes(start, words, row, panel, place, rows, panels, group)
        where = values + at
        for k in tl.static_range(REACH):
            kept = (own & (1 << k)) != 0
            weight = tl.load(where, mask=kept, other=0).to(tl.float32)
            where += kept.to(tl.int32)
            column = panel * 64 + place + k
            inside = column < cols
            sum0 += weight * tl.load(x + column, mask=inside, other=0).to(tl.float32)[None, :]
            if TOKENS > 1:
                sum1 += weight * tl.load(x + cols + column, mask=inside, other=0).to(tl.float32)[None, :]
            if TOKENS > 2:
                sum2 += weight * tl.load(x + 2 * cols + column, mask=inside, other=0).to(tl.float32)[None, :]
            if TOKENS > 3:
                sum3 += weight * tl.load(x + 3 * cols + column, mask=inside, other=0).to(tl.float32)[None, :]
    _finish(y, bias, tl.sum(sum0, 1), row, rows, BIASED, ACTIVATION)
    if TOKENS > 1:
        _finish(y + rows, bias, tl.sum(sum1, 1), row, rows, BIASED, ACTIVATION)
    if TOKENS > 2:
        _finish(y + 2 * rows, bias, tl.sum(sum2, 1), row, rows, BIASED, ACTIVATION)
    if TOKENS > 3:
        _finish(y + 3 * rows, bias, tl.sum(sum3, 1), row, rows, BIASED, ACTIVATION)


@triton.jit
def unpack(
    values, start, words, dense, rows, cols, group,
    ROWS: tl.constexpr, PANELS: tl.constexpr,
):  # fmt: skip
    """The dense matrix ``(rows, cols)``, contiguous: a lane for each column, so that stores lie side by side."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, PANELS * 64)
    panel = tl.program_id(1) * PANELS + lane // 64
    own, at = _lanes(start, words, row, panel, lane % 64, rows, (cols + 63) // 64, group)
    weight = tl.load(values + at, mask=(own & 1) != 0, other=0)
    column = tl.program_id(1) * PANELS * 64 + lane
    inside = (row < rows)[:, None] & (column < cols)[None, :]
    tl.store(dense + row.to(tl.int64)[:, None] * cols + column[None, :], weight, mask=inside)
