"""Integer codes by inputs in fixed point, four bytes at a time, for OpenAI-Triton kernels of one token.

Columns that share a load have 16 bits each of the largest of them, more than 16-bit floating point has: what that
leaves out is a hundredth of what rounding the result does. Two dot products of four bytes (PTX `dp4a`), one of the
inputs' high bytes and one of the low ones, take the place of four masks and four multiplications. All sums are exact.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, N806
from __future__ import annotations

import triton
import triton.language as tl

LEAST = tl.constexpr(1e-30)
"""Below it inputs count as 0: their reciprocal has to be a number."""


@triton.jit
def unit_of(x0, x1, x2, x3):
    """Of fixed point for the columns of four words, and how many there are to one: [fours]."""
    sizes = _larger(_larger(tl.abs(x0), tl.abs(x1)), _larger(tl.abs(x2), tl.abs(x3)))
    if sizes.shape[1] == 8:
        sizes = _halved(sizes)
    sizes = _halved(sizes)
    first, second = tl.split(sizes)
    top = _larger(first, second)
    top = _larger(top, tl.full(top.shape, LEAST, tl.float32))
    return top * (1 / 32767), 32767.0 / top


@triton.jit
def _halved(x):
    """[fours, columns] -> half of the columns, the larger of two each."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    return _larger(even, odd)


@triton.jit
def _larger(a, b):
    """What is no number stays none."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def fixed(x, many):
    """[fours, columns] -> the same whole, in the low half of int32: what is added makes them a float's last bits."""
    return (x * many[:, None] + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def _pair(a, b, WHICH: tl.constexpr):
    """Bytes of two words in one."""
    PTX: tl.constexpr = f"prmt.b32 $0, $1, $2, {WHICH};"
    return tl.inline_asm_elementwise(PTX, "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def _four(a, b, c, d):
    """The low bytes of four numbers in a word, and their second ones."""
    first, second = _pair(a, b, 0x5140), _pair(c, d, 0x5140)
    return _pair(first, second, 0x5410), _pair(first, second, 0x7632)


@triton.jit
def in_bytes(f, LEVELS: tl.constexpr):
    """What fixed gives for a word of codes, [fours, columns] -> low and high bytes of columns that a mask of codes has.

    int4: the even columns, then the odd ones; int8: all four, twice.
    """
    even, odd = tl.split(tl.reshape(f, [f.shape[0], f.shape[1] // 2, 2]))
    if LEVELS == 16:
        even_low, even_high = _of_four(even)
        odd_low, odd_high = _of_four(odd)
        return even_low, even_high, odd_low, odd_high
    else:
        f0, f2 = tl.split(even)
        f1, f3 = tl.split(odd)
        low, high = _four(f0, f1, f2, f3)
        return low, high, low, high


@triton.jit
def _of_four(f):
    """[fours, 4]"""
    even, odd = tl.split(tl.reshape(f, [f.shape[0], 2, 2]))
    f0, f2 = tl.split(even)
    f1, f3 = tl.split(odd)
    return _four(f0, f1, f2, f3)


@triton.jit
def dotted(codes, low, high, low_sum, high_sum):
    """Four codes of each word by four inputs, added to sums."""
    LOW: tl.constexpr = "dp4a.u32.u32 $0, $1, $2, $3;"
    HIGH: tl.constexpr = "dp4a.u32.s32 $0, $1, $2, $3;"
    low_sum = tl.inline_asm_elementwise(LOW, "=r,r,r,r", [codes, low, low_sum], tl.int32, True, 1)
    high_sum = tl.inline_asm_elementwise(HIGH, "=r,r,r,r", [codes, high, high_sum], tl.int32, True, 1)
    return low_sum, high_sum


@triton.jit
def _word(q, f, low_sum, high_sum, LEVELS: tl.constexpr):
    """One word of each four, [rows, fours], by its inputs, [fours, columns]."""
    low, high, odd_low, odd_high = in_bytes(f, LEVELS)
    if LEVELS == 16:  # the even column is the high half of its byte
        low_sum, high_sum = dotted((q >> 4) & 0x0F0F0F0F, low[None, :], high[None, :], low_sum, high_sum)
        return dotted(q & 0x0F0F0F0F, odd_low[None, :], odd_high[None, :], low_sum, high_sum)
    else:
        return dotted(q, low[None, :], high[None, :], low_sum, high_sum)


@triton.jit
def meant(q0, q1, q2, q3, f0, f1, f2, f3, each, low, unit, SYMMETRIC: tl.constexpr, LEVELS: tl.constexpr):
    """What four words' weights give, [rows, fours]; f0 and so on: the inputs of each in fixed point."""
    none = tl.zeros(q0.shape, tl.int32)
    low_sum, high_sum = _word(q0, f0, none, none, LEVELS)
    low_sum, high_sum = _word(q1, f1, low_sum, high_sum, LEVELS)
    low_sum, high_sum = _word(q2, f2, low_sum, high_sum, LEVELS)
    low_sum, high_sum = _word(q3, f3, low_sum, high_sum, LEVELS)
    dots = high_sum * 256 + low_sum
    alone = (_alone(f0, LEVELS) + _alone(f1, LEVELS) + _alone(f2, LEVELS) + _alone(f3, LEVELS))[None, :]
    if SYMMETRIC:
        return (dots - LEVELS // 2 * alone).to(tl.float32) * unit[None, :] * each
    else:
        return (dots.to(tl.float32) * each + alone.to(tl.float32) * low) * unit[None, :]


@triton.jit
def _alone(f, LEVELS: tl.constexpr):
    """The sum of a word's inputs themselves, [fours]."""
    low, high, odd_low, odd_high = in_bytes(f, LEVELS)
    none, ones = tl.zeros(low.shape, tl.int32), tl.full(low.shape, 0x01010101, tl.int32)
    low_sum, high_sum = dotted(ones, low, high, none, none)
    if LEVELS == 16:
        low_sum, high_sum = dotted(ones, odd_low, odd_high, low_sum, high_sum)
    return high_sum * 256 + low_sum
