"""Several tokens' product with packed weights by tensor cores, as OpenAI-Triton kernels.

A program streams some rows of codes and makes them weights of the inputs' type in registers, rounded as Packed.full
rounds them; one scale a row meets the sums instead. They know neither the rule that shapes them nor what it is for.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, N806
from __future__ import annotations

from functools import partial

import triton
import triton.language as tl

from backend.compute.dense.packed_codes import high, low, steps, whole
from backend.compute.dense.small_kernels import clamped, finish, streamed


@partial(triton.jit, do_not_specialize=["tokens"])
def packed_matrix_kernel(
    result, all_sums, x, codes, scale, offset, bias, residual, outputs, tokens,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr,
    STAGES: tl.constexpr, SPLITS: tl.constexpr, LEVELS: tl.constexpr, DIVIDES: tl.constexpr, APART: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The weights' rows are the rows of the product, tokens its columns.

    Of COLUMNS and GROUP, powers of two, one divides the other; or GROUP is WIDTH. APART: x holds a token's even columns
    and then its odd ones.
    """
    PER: tl.constexpr = 2 if LEVELS == 16 else 1
    SHARE: tl.constexpr = (WIDTH + COLUMNS * SPLITS - 1) // (COLUMNS * SPLITS) * COLUMNS
    EVEN: tl.constexpr = WIDTH % (COLUMNS * SPLITS) == 0
    GROUPS: tl.constexpr = COLUMNS // GROUP if COLUMNS > GROUP and GROUP < WIDTH else 1
    LATE: tl.constexpr = GROUP == WIDTH and offset is None
    OVER: tl.constexpr = 0.0 if LEVELS == 0 else (1.5 if offset is None else 1.0)
    UNIT: tl.constexpr = 1.0 if LEVELS == 0 else LEVELS
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    safe = clamped(row, outputs)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    live = token < tokens
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    for begin in tl.range(0, SHARE, COLUMNS, num_stages=STAGES):
        start = tl.program_id(1) * SHARE + begin
        at = start // PER + tl.arange(0, COLUMNS // PER)
        q = streamed(codes + safe[:, None] * (WIDTH // PER) + at[None, :], (at < WIDTH // PER)[None, :], EVEN)
        even, odd = _inputs(x, token, live, start, WIDTH, COLUMNS, PER, APART, EVEN)
        first, second = _numbers(q, LEVELS)
        if LATE:
            first, second = first - OVER, second - OVER
        else:
            group = tl.minimum(start // GROUP + tl.arange(0, GROUPS), WIDTH // GROUP - 1)
            there = safe[:, None] * (WIDTH // GROUP) + group[None, :]
            each = steps(scale + there, DIVIDES) * UNIT
            least = -OVER * each
            if offset is not None:
                least += tl.load(offset + there).to(tl.float32)
            each, least = _spread(each, COLUMNS // PER), _spread(least, COLUMNS // PER)
            first, second = first * each + least, second * each + least
        sums = tl.dot(first.to(even.dtype), even, sums, input_precision=PRECISION)
        if PER == 2:
            sums = tl.dot(second.to(odd.dtype), odd, sums, input_precision=PRECISION)
    if LATE:
        sums *= (steps(scale + safe, DIVIDES) * UNIT)[:, None]
    mask = (row < outputs)[:, None] & live[None, :]
    where = token.to(tl.int64)[None, :] * outputs + row[:, None]
    if SPLITS > 1:
        tl.store(all_sums + tl.program_id(1).to(tl.int64) * tokens * outputs + where, sums, mask=mask)
    else:
        finish(result, sums, sums, bias, residual, where, row[:, None], mask, outputs, "")


@triton.jit
def _numbers(q, LEVELS: tl.constexpr):
    """Of the even columns and the odd ones; of all, twice, where codes are bytes."""
    if LEVELS == 16:
        return high(q), low(q)
    else:
        return whole(q, LEVELS), whole(q, LEVELS)


@triton.jit
def _spread(each, BYTES: tl.constexpr):
    """[rows, groups] -> [rows, bytes]"""
    ROWS: tl.constexpr = each.shape[0]
    GROUPS: tl.constexpr = each.shape[1]
    return tl.reshape(tl.broadcast_to(each[:, :, None], [ROWS, GROUPS, BYTES // GROUPS]), [ROWS, BYTES])


@triton.jit
def _inputs(
    x, token, live, start,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PER: tl.constexpr, APART: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The tile's even and odd columns of x, [columns, tokens] each; all of them, twice, where codes are bytes."""
    line = x + token.to(tl.int64)[:, None] * WIDTH
    if APART:
        at = start // 2 + tl.arange(0, COLUMNS // 2)
        known = live[:, None] if EVEN else live[:, None] & (at < WIDTH // 2)[None, :]
        even = tl.load(line + at[None, :], mask=known, other=0.0, eviction_policy="evict_last")
        odd = tl.load(line + (WIDTH // 2 + at)[None, :], mask=known, other=0.0, eviction_policy="evict_last")
    else:
        at = start + tl.arange(0, COLUMNS)
        known = live[:, None] if EVEN else live[:, None] & (at < WIDTH)[None, :]
        even = tl.load(line + at[None, :], mask=known, other=0.0, eviction_policy="evict_last")
        odd = even
        if PER == 2:
            even, odd = tl.split(tl.reshape(even, [even.shape[0], COLUMNS // 2, 2]))
    return tl.trans(even), tl.trans(odd)


@triton.jit
def apart_kernel(apart, x, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Each token's even columns before its odd ones."""
    start = tl.program_id(0).to(tl.int64) * WIDTH
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    even, odd = tl.split(tl.reshape(tl.load(x + start + at, mask=at < WIDTH, other=0.0), [BLOCK // 2, 2]))
    half = tl.program_id(1) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    tl.store(apart + start + half, even, mask=half < WIDTH // 2)
    tl.store(apart + start + WIDTH // 2 + half, odd, mask=half < WIDTH // 2)
