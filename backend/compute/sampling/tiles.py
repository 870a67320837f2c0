"""Passes over a stretch of one row of logits: sums above some values, and the greatest score with its noise.

Masses are integers, so that no order of adding, no batch and no number of programs changes them. Values compare as
integers, keys, that rise with them: x + 1 is the next float.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

if triton.knobs.runtime.interpret:

    @triton.jit
    def quick_log(x):
        """The interpreter has no library."""
        return tl.log(x)
else:
    quick_log = libdevice.fast_logf  # off by at most 2e-7 between 0.5 and 2

NOWHERE = tl.constexpr(2**31 - 1)
UNIT = tl.constexpr(float(2**40))
"""The mass of the most likely token. 2 ** 18 tokens stay below 2 ** 58."""
LOWEST = tl.constexpr(-0x7F800001)
"""The key of -inf."""
NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def key(x):
    """Float32, no NaN -> int32 in the same order; both zeros have one."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def unkey(k):
    """The float32 of a key."""
    return tl.where(k < 0, k ^ 0x7FFFFFFF, k).to(tl.float32, bitcast=True)


@triton.jit
def read(row, at, width):
    """Logits as float32; -inf beyond the row."""
    return tl.load(row + at, mask=at < width, other=NOTHING).to(tl.float32)


@triton.jit
def inverse(temperature):
    """What scores are multiplied by."""
    return 1.0 / tl.maximum(temperature, 1.1754943508222875e-38)


@triton.jit
def mass(score):
    """int64: exp(score) of a score that is never above 0."""
    return (tl.exp(score) * UNIT).to(tl.int64)


@triton.jit
def noise(first, second, ids):
    """See noise.gumbel and noise.bits: the same numbers, but for the rounding of the logarithms."""
    mixed = ids ^ first
    mixed ^= (mixed >> 16) & 0xFFFF
    mixed *= 0x7FEB352D
    mixed ^= (mixed >> 15) & 0x1FFFF
    mixed ^= second
    mixed *= -0x7B935975
    mixed ^= (mixed >> 16) & 0xFFFF
    mixed &= 0x7FFFFFFF
    u = tl.minimum((mixed.to(tl.float32) + 0.5) * 4.656612873077393e-10, 0.9999999403953552)
    return -quick_log(tl.where(u < 0.125, _minus_log1p(u), -quick_log(1.0 - u)))


@triton.jit
def _minus_log1p(u):
    """-log(1 - u) of small u, where the logarithm of the rounded difference would be coarse: the series."""
    series = 1 / 9 + u * 0.1
    series = 1 / 7 + u * (1 / 8 + u * series)
    series = 1 / 5 + u * (1 / 6 + u * series)
    series = 1 / 3 + u * (1 / 4 + u * series)
    return u * (1.0 + u * (0.5 + u * series))


@triton.jit
def sums(row, start, stop, width, best, temperature, pivots, BLOCK: tl.constexpr, PIVOTS: tl.constexpr):
    """How many logits in [start, stop) have at least each pivot's key, and their mass: int32, int64 [PIVOTS]."""
    colder, bounds = inverse(temperature), unkey(pivots)[:, None]
    count = tl.zeros([PIVOTS, BLOCK], tl.int32)
    total = tl.zeros([PIVOTS, BLOCK], tl.int64)
    for tile in range(start, stop, BLOCK):
        x = read(row, tile + tl.arange(0, BLOCK)[None, :], width)
        above = x >= bounds
        count += above.to(tl.int32)
        total += tl.where(above, mass((x - best) * colder), 0)
    return tl.sum(count, 1), tl.sum(total, 1)


@triton.jit
def drawn(row, start, stop, width, best, temperature, log_min_p, least, first, second, BLOCK: tl.constexpr):
    """The greatest score with noise in [start, stop) of logits with at least the key `least`; its lowest id; the mass.

    The mass is that of all logits.
    """
    colder, bound = inverse(temperature), unkey(least)
    top = tl.full([BLOCK], NOTHING, tl.float32)
    where = tl.full([BLOCK], NOWHERE, tl.int32)
    total = tl.zeros([BLOCK], tl.int64)
    for tile in range(start, stop, BLOCK):
        at = tile + tl.arange(0, BLOCK)
        x = read(row, at, width)
        score = (x - best) * colder
        total += mass(score)
        held = (x >= bound) & (score >= log_min_p)
        noisy = tl.where(held, score + noise(first, second, at), NOTHING)
        where = tl.where(noisy > top, at, where)
        top = tl.maximum(noisy, top)
    greatest, token = lowest(top, where)
    return greatest, token, tl.sum(total, 0)


@triton.jit
def lowest(values, ids):
    """The greatest value [n] and the lowest of its ids."""
    greatest = tl.max(values, 0)
    return greatest, tl.min(tl.where(values == greatest, ids, NOWHERE), 0)


@triton.jit
def likelihood(row, start, stop, width, best, BLOCK: tl.constexpr):
    """The mass of [start, stop) at temperature 1."""
    total = tl.zeros([BLOCK], tl.int64)
    for tile in range(start, stop, BLOCK):
        total += mass(read(row, tile + tl.arange(0, BLOCK), width) - best)
    return tl.sum(total, 0)
