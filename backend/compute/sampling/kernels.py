"""Kernels of a draw: each looks at what the one before it left, and at as much of the logits as a row still needs.

A row stands as two numbers of programs: (rows, parts), but in last_kernel, where one program has a whole row. Work
tensors: values, ids [2 + rounds, rows, parts], the greatest of each part: of the logits, of the first draw, of each
round's; masses [2, rows, parts], with temperature and without; counts, sums [rows, parts, PIVOTS]; known [rounds, rows,
FIELDS], what search.py knows after each round.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803
from __future__ import annotations

import triton
import triton.language as tl

from backend.compute.dense.best import _top as top_of
from backend.compute.sampling.search import begun, kept, narrowed, pivots, settings
from backend.compute.sampling.tiles import LOWEST, NOTHING, NOWHERE, UNIT, drawn, key, likelihood, read, sums

PIVOTS = tl.constexpr(4)
FIELDS = tl.constexpr(8)
MISSING = tl.constexpr(-1)
"""sampler.BROKEN."""
GREATEST = tl.constexpr(0x7F800000)
"""The key of infinity."""


@triton.jit
def peak_kernel(logits, stride, width, values, ids, SPAN: tl.constexpr):
    """Greatest logit of each part and its lowest id; NaN is greater than anything."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = part * SPAN + tl.arange(0, SPAN)
    x = read(logits + row * stride, at, width)
    value, index = top_of(x, tl.where(at < width, at, NOWHERE))
    _keep(values, ids, 0, row, part, tl.num_programs(1), value, index)


@triton.jit
def first_kernel(
    logits, stride, width, words, values, ids, masses,
    SPAN: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, LOGPROBS: tl.constexpr,
):  # fmt: skip
    """The first draw of each part, of all that min_p leaves, and its mass."""
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    best, _ = _joined(values, ids, 0, row, parts, PARTS)
    temperature, _, log_min_p, _, first, second = settings(words, row, width)
    logits += row * stride
    start, stop = part * SPAN, tl.minimum(part * SPAN + SPAN, width)
    if _drawn(temperature, best):
        value, token, total = drawn(
            logits,
            start,
            stop,
            width,
            best,
            temperature,
            log_min_p,
            tl.full([], LOWEST, tl.int32),
            first,
            second,
            BLOCK,
        )
        _keep(values, ids, 1, row, part, parts, value, token)
        tl.store(masses + row * parts + part, total)
    if LOGPROBS:  # noqa: SIM102 - known when this is compiled, unlike the next
        if best - best == 0:
            at = (tl.num_programs(0) + row) * parts + part
            tl.store(masses + at, likelihood(logits, start, stop, width, best, BLOCK))


@triton.jit
def sum_kernel(
    logits, stride, width, words, values, ids, masses, known, counts, totals,
    STEP: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Each part's sums above the pivots of this step."""
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    temperature, top_p, _, top_k, _, _ = settings(words, row, width)
    logits += row * stride
    best, x, _, k_low, k_high, p_low, p_high, _, _ = _known(
        logits, values, ids, masses, known, row, parts, temperature, top_k, top_p, STEP, PARTS
    )
    if not kept(x, k_high, p_high):
        at = pivots(x, k_low, k_high, p_low, p_high, best, temperature, STEP, PIVOTS)
        start, stop = part * SPAN, tl.minimum(part * SPAN + SPAN, width)
        count, total = sums(logits, start, stop, width, best, temperature, at, BLOCK, PIVOTS)
        where = (row * parts + part) * PIVOTS + tl.arange(0, PIVOTS)
        tl.store(counts + where, count)
        tl.store(totals + where, total)


@triton.jit
def again_kernel(
    logits, stride, width, words, values, ids, masses, known, counts, totals,
    STEP: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Another draw of each part, where the sums drop the one before."""
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    temperature, top_p, log_min_p, top_k, first, second = settings(words, row, width)
    logits += row * stride
    best, x, token, k_low, k_high, p_low, p_high, least, most = _known(
        logits, values, ids, masses, known, row, parts, temperature, top_k, top_p, STEP, PARTS
    )
    if not kept(x, k_high, p_high):
        at = pivots(x, k_low, k_high, p_low, p_high, best, temperature, STEP, PIVOTS)
        k_low, k_high, p_low, p_high, least, most = narrowed(
            at, _summed(counts, row, parts, PARTS), _summed(totals, row, parts, PARTS),
            k_low, k_high, p_low, p_high, least, most, top_k, top_p,
        )  # fmt: skip
        lower = tl.maximum(k_low, p_low)
        if x < lower:
            start, stop = part * SPAN, tl.minimum(part * SPAN + SPAN, width)
            value, drawn_token, _ = drawn(
                logits, start, stop, width, best, temperature, log_min_p, lower, first, second, BLOCK
            )
            _keep(values, ids, STEP + 2, row, part, parts, value, drawn_token)
    if part == 0:
        to = known + (STEP * tl.num_programs(0) + row) * FIELDS
        tl.store(to, k_low.to(tl.int64))
        tl.store(to + 1, k_high.to(tl.int64))
        tl.store(to + 2, p_low.to(tl.int64))
        tl.store(to + 3, p_high.to(tl.int64))
        tl.store(to + 4, least)
        tl.store(to + 5, most)
        tl.store(to + 6, x.to(tl.int64))
        tl.store(to + 7, token.to(tl.int64))


@triton.jit
def last_kernel(
    logits, stride, width, words, values, ids, masses, known, parts, tokens, logprobs,
    STEP: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, LOGPROBS: tl.constexpr,
):  # fmt: skip
    """The token of each row, after as many more rounds as it needs."""
    row = tl.program_id(0).to(tl.int64)
    temperature, top_p, log_min_p, top_k, first, second = settings(words, row, width)
    logits += row * stride
    best, x, token, k_low, k_high, p_low, p_high, least, most = _known(
        logits, values, ids, masses, known, row, parts, temperature, top_k, top_p, STEP, PARTS
    )
    step = tl.full([], STEP, tl.int32)
    searching = (x + 1) < tl.maximum(k_high, p_high)
    while searching:
        at = pivots(x, k_low, k_high, p_low, p_high, best, temperature, step, PIVOTS)
        count, total = sums(logits, 0, width, width, best, temperature, at, BLOCK, PIVOTS)
        k_low, k_high, p_low, p_high, least, most = narrowed(
            at, count, total, k_low, k_high, p_low, p_high, least, most, top_k, top_p
        )
        lower = tl.maximum(k_low, p_low)
        if x < lower:
            _, token, _ = drawn(logits, 0, width, width, best, temperature, log_min_p, lower, first, second, BLOCK)
            x = _key_at(logits, token)
        step += 1
        searching = (x + 1) < tl.maximum(k_high, p_high)
    tl.store(tokens + row, token.to(tl.int64))
    if LOGPROBS:
        at = tl.arange(0, PARTS)
        whole = (tl.num_programs(0) + row) * parts
        total = tl.sum(tl.load(masses + whole + at, mask=at < parts, other=0), 0)
        chosen = tl.load(logits + tl.maximum(token, 0)).to(tl.float32) - best
        tl.store(logprobs + row, chosen - tl.log(total.to(tl.float32) / UNIT))


@triton.jit
def _drawn(temperature, best):
    """Whether the row takes any other than its greatest logit; one that is not finite less itself is not 0."""
    return (temperature > 0) & (best - best == 0)


@triton.jit
def _known(
    logits, values, ids, masses, known, row, parts, temperature, top_k, top_p, STEP: tl.constexpr, PARTS: tl.constexpr
):
    """Of a row before a step: best logit, key x and token of the last draw, and what search.py knows."""
    best, greedy = _joined(values, ids, 0, row, parts, PARTS)
    live = _drawn(temperature, best)
    if STEP == 0:
        _, token = _joined(values, ids, 1, row, parts, PARTS)
        token = tl.where(live, token, tl.where(best - best == 0, greedy, MISSING))
        x = _key_at(logits, token)
        at = tl.arange(0, PARTS)
        total = tl.sum(tl.load(masses + row * parts + at, mask=at < parts, other=0), 0)
        k_low, k_high, p_low, p_high, least, most = begun(live, best, top_k, top_p, total)
    else:
        of = known + ((STEP - 1) * tl.num_programs(0) + row) * FIELDS
        k_low, k_high = tl.load(of).to(tl.int32), tl.load(of + 1).to(tl.int32)
        p_low, p_high = tl.load(of + 2).to(tl.int32), tl.load(of + 3).to(tl.int32)
        least, most = tl.load(of + 4), tl.load(of + 5)
        x, token = tl.load(of + 6).to(tl.int32), tl.load(of + 7).to(tl.int32)
        if x < tl.maximum(k_low, p_low):
            _, token = _joined(values, ids, STEP + 1, row, parts, PARTS)
            x = _key_at(logits, token)
    return best, x, token, k_low, k_high, p_low, p_high, least, most


@triton.jit
def _key_at(logits, token):
    """The key of a token's logit; of a missing one the greatest, so that no other is looked for in its place."""
    found = key(tl.load(logits + tl.maximum(token, 0)).to(tl.float32))
    return tl.where(token < 0, GREATEST, found)


@triton.jit
def _keep(values, ids, slot, row, part, parts, value, token):
    """Store what one part has of the slot."""
    where = (slot * tl.num_programs(0) + row) * parts + part
    tl.store(values + where, value)
    tl.store(ids + where, token)


@triton.jit
def _joined(values, ids, slot, row, parts, PARTS: tl.constexpr):
    """The greatest value of a row's parts and its lowest id."""
    at = tl.arange(0, PARTS)
    where = (slot * tl.num_programs(0) + row) * parts + at
    value = tl.load(values + where, mask=at < parts, other=NOTHING)
    return top_of(value, tl.load(ids + where, mask=at < parts, other=NOWHERE))


@triton.jit
def _summed(sums_of, row, parts, PARTS: tl.constexpr):
    """A row's sums above each pivot, int64 [PIVOTS]."""
    at, pivot = tl.arange(0, PARTS)[:, None], tl.arange(0, PIVOTS)[None, :]
    return tl.sum(tl.load(sums_of + (row * parts + at) * PIVOTS + pivot, mask=at < parts, other=0), 0)
