"""Several tokens' product with packed weights by tensor cores, as OpenAI-Triton kernels.

A program streams some rows of codes, two bytes at a time, and makes them weights in the registers from which tensor
cores take them: codes at the same place of their two bytes are one operand, and so nothing changes threads. The columns
of x that they meet have been put side by side before. One scale a row meets the sums instead of the weights. The
kernels know neither the rule that shapes them nor what it is for.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, N806
from __future__ import annotations

from functools import partial

import triton
import triton.language as tl

from backend.compute.dense.packed_codes import numbers, scaled, steps
from backend.compute.dense.small_kernels import clamped, finish, kept, streamed


@partial(triton.jit, do_not_specialize=["tokens"])
def packed_matrix_kernel(
    result, all_sums, x, codes, scale, offset, bias, residual, outputs, tokens,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
    STAGES: tl.constexpr, SPLITS: tl.constexpr, LEVELS: tl.constexpr, DIVIDES: tl.constexpr, PAIRED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The weights' rows are the rows of the product, tokens its columns; x as arranged_kernel leaves it.

    Of COLUMNS and GROUP, powers of two, one divides the other; or GROUP is WIDTH. PAIRED: see packed_codes.numbers.
    """
    PER: tl.constexpr = 4 if LEVELS == 16 else 2
    SHARE: tl.constexpr = (WIDTH + COLUMNS * SPLITS - 1) // (COLUMNS * SPLITS) * COLUMNS
    EVEN: tl.constexpr = WIDTH % (COLUMNS * SPLITS) == 0
    LATE: tl.constexpr = GROUP == WIDTH and offset is None
    PLACES: tl.constexpr = WIDTH // PER
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    safe = clamped(row, outputs)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    live = token < tokens
    line = x + tl.where(live, token, 0).to(tl.int64)[:, None] * WIDTH
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    for tile in tl.range(0, SHARE, COLUMNS, num_stages=STAGES):
        start = tl.program_id(1) * SHARE + tile
        at = start // PER + tl.arange(0, COLUMNS // PER)
        inside = (at < PLACES)[None, :]
        q = streamed(codes + safe[:, None] * PLACES + at[None, :], inside, EVEN)
        if not LATE:
            each, middle = _scales(
                scale, offset, safe, start, WIDTH, GROUP, COLUMNS, COLUMNS // PER, EVEN, LEVELS, DIVIDES, PAIRED
            )
        for place in tl.static_range(PER):
            part = kept(line + place * PLACES + at[None, :], inside, EVEN)
            w = numbers(q, place, LEVELS, PAIRED)
            if not LATE:
                w = scaled(w, each, middle, PAIRED)
            sums = tl.dot(w.to(part.dtype), tl.trans(part), sums, input_precision=PRECISION)
    if LATE:
        sums *= steps(scale + safe, DIVIDES)[:, None]
    mask = (row < outputs)[:, None] & live[None, :]
    where = token.to(tl.int64)[None, :] * outputs + row[:, None]
    if SPLITS > 1:
        tl.store(all_sums + tl.program_id(1).to(tl.int64) * tokens * outputs + where, sums, mask=mask)
    else:
        finish(result, sums, sums, bias, residual, where, row[:, None], mask, outputs, "")


@triton.jit
def _scales(
    scale, offset, row, start,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr, PLACES: tl.constexpr, EVEN: tl.constexpr,
    LEVELS: tl.constexpr, DIVIDES: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """What numbers of the columns from `start` are multiplied with, and what is added then, [rows, places]."""
    GROUPS: tl.constexpr = COLUMNS // GROUP if COLUMNS > GROUP and GROUP < WIDTH else 1
    group = (start // GROUP if GROUP < WIDTH else 0) + tl.arange(0, GROUPS)
    if not EVEN:
        group = tl.minimum(group, WIDTH // GROUP - 1)
    there = row[:, None] * (WIDTH // GROUP) + group[None, :]
    each = steps(scale + there, DIVIDES, PAIRED)
    middle = tl.zeros_like(each)
    if offset is not None:
        middle = tl.load(offset + there).to(tl.float32) + each * (LEVELS // 2)
    if PAIRED:
        each, middle = each.to(tl.bfloat16), middle.to(tl.bfloat16)
    return _spread(each, PLACES), _spread(middle, PLACES)


@triton.jit
def _spread(each, PLACES: tl.constexpr):
    """[rows, groups] -> [rows, places]"""
    ROWS: tl.constexpr = each.shape[0]
    GROUPS: tl.constexpr = each.shape[1]
    return tl.reshape(tl.broadcast_to(each[:, :, None], [ROWS, GROUPS, PLACES // GROUPS]), [ROWS, PLACES])


@triton.jit
def arranged_kernel(
    arranged, x, gain, eps, WIDTH: tl.constexpr, SPAN: tl.constexpr, PER: tl.constexpr, BLOCK: tl.constexpr
):
    """Of every SPAN columns 0, PER, 2 * PER and so on, then 1, PER + 1 and so on; with a gain, whole and normed."""
    line = tl.program_id(0).to(tl.int64) * WIDTH
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    found = tl.load(x + line + at, mask=at < WIDTH, other=0.0)
    if gain is not None:
        exact = found.to(tl.float32)
        scale = tl.rsqrt(tl.sum(exact * exact, 0) / WIDTH + eps)
        found = (exact * scale * tl.load(gain + at, mask=at < WIDTH, other=0.0).to(tl.float32)).to(found.dtype)
    place = at // SPAN * SPAN + at % PER * (SPAN // PER) + at % SPAN // PER
    tl.store(arranged + line + place, found, mask=at < WIDTH)
