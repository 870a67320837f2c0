"""One token's product with packed weights as an OpenAI-Triton kernel; it does not know what shapes it.

A thread loads words of four bytes of codes, of many rows at a time, and the inputs that they meet: so nothing changes
threads before the last sum, which costs more than loads of 16 bytes would save. Group scales meet the sum of a word's
products, not its codes.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, N806
from __future__ import annotations

import triton
import triton.language as tl

from backend.compute.dense.packed_codes import HALF_UNIT, halves, mantissa, steps
from backend.compute.dense.small_kernels import clamped, finish, kept


@triton.jit
def packed_vector_kernel(
    result, x, codes, scale, offset, bias, residual, gain, eps, outputs,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, STAGES: tl.constexpr,
    LEVELS: tl.constexpr, DIVIDES: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """codes: int32, the bytes four at a time; WORDS of them of each row at once. No word is in two groups."""
    PER: tl.constexpr = 8 if LEVELS == 16 else 4
    EVEN: tl.constexpr = WIDTH % (WORDS * PER) == 0
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first, second = clamped(row, outputs), clamped(row, outputs) + outputs
    words = tl.arange(0, WORDS)
    columns = words[:, None] * PER + tl.arange(0, PER)[None, :]
    sums = tl.zeros([WORDS, ROWS], tl.float32)
    gate_sums = tl.zeros([WORDS, ROWS], tl.float32)
    squares = tl.zeros([WORDS], tl.float32)
    for start in tl.range(0, WIDTH // PER, WORDS, num_stages=STAGES):
        word = start + words
        inside = (word < WIDTH // PER)[:, None]
        group = tl.minimum(word * PER // GROUP, WIDTH // GROUP - 1)[:, None]
        there = first[None, :] * (WIDTH // GROUP) + group
        q = _words(codes + first[None, :] * (WIDTH // PER) + word[:, None], inside, EVEN)
        each = steps(scale + there, LEVELS, DIVIDES)
        low = _low(offset, there)
        if ACTIVATION != "":
            there = second[None, :] * (WIDTH // GROUP) + group
            more_q = _words(codes + second[None, :] * (WIDTH // PER) + word[:, None], inside, EVEN)
            more_each = steps(scale + there, LEVELS, DIVIDES)
            more_low = _low(offset, there)
        part = kept(x + start * PER + columns, inside, EVEN).to(tl.float32)
        if gain is not None:
            squares += tl.sum(part * part, 1)
            part *= kept(gain + start * PER + columns, inside, EVEN).to(tl.float32)
        alone = tl.sum(part, 1)[:, None]
        if ACTIVATION == "":
            sums += _meant(_dots(q, part, LEVELS), alone, each, low, offset is None, LEVELS)
        else:
            gate_sums += _meant(_dots(q, part, LEVELS), alone, each, low, offset is None, LEVELS)
            sums += _meant(_dots(more_q, part, LEVELS), alone, more_each, more_low, offset is None, LEVELS)
    norm = 1.0
    if gain is not None:
        norm = tl.rsqrt(tl.sum(squares, 0) / WIDTH + eps)
    total, gate = tl.sum(sums, 0) * norm, tl.sum(gate_sums, 0) * norm
    finish(result, total, gate, bias, residual, row, row, row < outputs, outputs, ACTIVATION)


@triton.jit
def _words(at, inside, EVEN: tl.constexpr):
    """[words, rows]; words a thread each, like the inputs: as if they were not contiguous."""
    at = tl.max_contiguous(at, [1, 1])
    if EVEN:
        return tl.load(at, eviction_policy="evict_first")
    else:
        return tl.load(at, mask=inside, other=0, eviction_policy="evict_first")


@triton.jit
def _low(offset, there):
    """Without offsets something that is not used."""
    if offset is None:
        return there
    else:
        return tl.load(offset + there).to(tl.float32)


@triton.jit
def _dots(q, x, LEVELS: tl.constexpr):
    """Words [words, rows] by x [words, columns of a word] -> [words, rows], as packed_codes has the numbers."""
    if LEVELS == 16:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], 2, 2, 2]))
        even_low, even_high = tl.split(even)  # columns 0 and 4, 2 and 6
        odd_low, odd_high = tl.split(odd)
        x0, x4 = tl.split(even_low)
        x2, x6 = tl.split(even_high)
        x1, x5 = tl.split(odd_low)
        x3, x7 = tl.split(odd_high)
        dots = mantissa(q << 15, 16) * x0[:, None]  # the even column is the high half of its byte
        dots += mantissa(q << 19, 16) * x1[:, None]
        dots += mantissa(q << 7, 16) * x2[:, None]
        dots += mantissa(q << 11, 16) * x3[:, None]
        dots += mantissa(q >> 1, 16) * x4[:, None]
        dots += mantissa(q << 3, 16) * x5[:, None]
        dots += mantissa(q >> 9, 16) * x6[:, None]
        return dots + mantissa(q >> 5, 16) * x7[:, None]
    else:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], 2, 2]))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        if LEVELS == 256:
            dots = mantissa(q << 15, 256) * x0[:, None]
            dots += mantissa(q << 7, 256) * x1[:, None]
            dots += mantissa(q >> 1, 256) * x2[:, None]
            return dots + mantissa(q >> 9, 256) * x3[:, None]
        else:
            first, third = halves(q << 8)
            second, fourth = halves(q)
            dots = first * x0[:, None]
            dots += second * x1[:, None]
            dots += third * x2[:, None]
            return dots + fourth * x3[:, None]


@triton.jit
def _meant(dots, alone, each, low, SYMMETRIC: tl.constexpr, LEVELS: tl.constexpr):
    """What the weights give: dots [words, rows], and alone [words, 1], the sums of x itself."""
    if LEVELS == 0:
        return dots * (each * HALF_UNIT)
    elif SYMMETRIC:
        return (dots - 1.5 * alone) * each
    else:
        return (dots - alone) * each + low * alone
