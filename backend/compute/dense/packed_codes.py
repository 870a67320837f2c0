"""Codes of packed weights as numbers in registers, for OpenAI-Triton kernels; which of them multiplies is not known.

Integer codes are not converted: their bits go into a float's mantissa, which gives 1 + q / levels exactly, in two
instructions. The 1 (1.5 where codes mean their distance from the middle) and the levels are put right later.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, N806
from __future__ import annotations

import triton
import triton.language as tl

LEVELS = {"int4": 16, "int8": 256, "fp8": 0}
"""What kernels know of a kind."""


@triton.jit
def mantissa(bits, LEVELS: tl.constexpr):
    """1 + q / levels of codes that lie, in an int32, at the top of the mantissa's place; 16 and 256 levels."""
    MASK: tl.constexpr = 0x780000 if LEVELS == 16 else 0x7F8000
    return ((bits & MASK) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def high(q):
    """1 + (q >> 4) / 16"""
    return mantissa(q.to(tl.int32) << 15, 16)


@triton.jit
def low(q):
    """1 + (q & 15) / 16"""
    return mantissa(q.to(tl.int32) << 19, 16)


@triton.jit
def whole(q, LEVELS: tl.constexpr):
    """1 + q / 256 of int8, the number itself of fp8."""
    return mantissa(q.to(tl.int32) << 15, 256) if LEVELS == 256 else q.to(tl.float32)


@triton.jit
def steps(at, DIVIDES: tl.constexpr):
    """What a code is to be multiplied with."""
    found = tl.load(at).to(tl.float32)
    if DIVIDES:
        found = 1.0 / found
    return found
