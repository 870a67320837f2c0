"""Search: what is known of a row's thresholds, and how sums above some values narrow it. It does not read logits.

A row is drawn by rejection: the greatest score with noise among all tokens that may be kept is also the greatest among
those that are kept, if it is itself kept. So no threshold has to be found, only the question whether one token, x,
is above it; where it is not, neither is any less likely token, and the next x is drawn from those above. Without a
sort, and nearly always after one or two passes: a token that top_p drops is drawn at most as often as 1 - top_p.

Of each threshold two keys are known: tokens below `low` are dropped, tokens at or above `high` are kept, as is x when
x + 1 is `high`. What top_k leaves is only bounded while its threshold is not exact: [least, most] of its mass.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803
from __future__ import annotations

import triton
import triton.language as tl

from backend.compute.sampling.tiles import LOWEST, key, unkey

WIDE = tl.constexpr(30.0)
"""Tokens whose score is lower have next to no probability: the first pivots stay above them."""


@triton.jit
def settings(words, row, width):
    """Temperature, top_p, log(min_p), top_k, two keys; top_k is 0 where it is off."""
    at = words + row * 6
    top_k = tl.load(at + 3)
    return (
        tl.load(at).to(tl.float32, bitcast=True),
        tl.load(at + 1).to(tl.float32, bitcast=True),
        tl.load(at + 2).to(tl.float32, bitcast=True),
        tl.where(top_k < width, top_k, 0),
        tl.load(at + 4),
        tl.load(at + 5),
    )


@triton.jit
def begun(live, best, top_k, top_p, total):
    """Everything may be kept, or surely is."""
    beyond = key(best) + 1
    none = tl.full([], LOWEST, tl.int32)
    k_high = tl.where(live & (top_k > 0), beyond, none)
    p_high = tl.where(live & (top_p < 1), beyond, none)
    least = tl.where(live & (top_k > 0), tl.zeros_like(total), total)
    return none, k_high, none, p_high, least, total


@triton.jit
def kept(x, k_high, p_high):
    """Whether x is surely kept."""
    return x + 1 >= tl.maximum(k_high, p_high)


@triton.jit
def pivots(x, k_low, k_high, p_low, p_high, best, temperature, step, PIVOTS: tl.constexpr):
    """The keys [PIVOTS] to sum above: x + 1, the others evenly between what is known, by value in even
    steps, by key in odd ones.

    While both thresholds are unknown, all but two of them go to top_k's, which bounds the other one.
    """
    index = tl.arange(0, PIVOTS)
    low, high = tl.maximum(tl.maximum(k_low, p_low), x), tl.maximum(k_high, p_high)
    both = (k_high > k_low + 1) & (p_high > p_low + 1)
    of_k = both & (index > 1)
    low, high = tl.where(of_k, k_low, low), tl.where(of_k, k_high, high)
    share = tl.where(both, tl.where(of_k, (index - 1) / (PIVOTS - 1), 0.5), index / PIVOTS).to(tl.float32)
    bottom = tl.maximum(unkey(low), best - WIDE * tl.maximum(temperature, 1e-30))
    value = bottom + (unkey(high) - bottom) * share
    distance = (high.to(tl.int64) - low.to(tl.int64)).to(tl.float64) * share
    between = low + distance.to(tl.int64)
    by_key = (step % 2 == 1) | (value != value)
    chosen = tl.where(by_key, between, key(value).to(tl.int64))
    chosen = tl.maximum(tl.minimum(chosen, high - 1), low + 1).to(tl.int32)
    return tl.where(index == 0, x + 1, chosen)


@triton.jit
def narrowed(pivots, counts, masses, k_low, k_high, p_low, p_high, least, most, top_k, top_p):
    """What is known, with the sums above some pivots [PIVOTS]."""
    if top_k > 0:
        reached = counts >= top_k
        k_low = tl.maximum(k_low, tl.max(tl.where(reached, pivots, LOWEST), 0))
        k_high = tl.minimum(k_high, tl.min(tl.where(reached, k_high, pivots), 0))
        most = tl.minimum(most, tl.min(tl.where(reached, masses, most), 0))
        least = tl.maximum(least, tl.max(tl.where(reached, least, masses), 0))
        least = tl.where(k_high <= k_low + 1, most, least)
    if top_p < 1:
        enough, little = wanted(most, top_p), wanted(least, top_p)
        found = masses.to(tl.float64)
        p_low = tl.maximum(p_low, tl.max(tl.where(found >= enough, pivots, LOWEST), 0))
        p_high = tl.minimum(p_high, tl.min(tl.where(found < little, pivots, p_high), 0))
    return k_low, k_high, p_low, p_high, least, most


@triton.jit
def wanted(total, top_p):
    """The mass that the kept tokens must reach; the most likely one always stays."""
    return tl.maximum(total.to(tl.float64) * top_p.to(tl.float64), 1.0)
