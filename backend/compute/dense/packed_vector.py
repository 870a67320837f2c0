"""One token's product with packed weights as an OpenAI-Triton kernel; it does not know what shapes it.

A thread loads words of four bytes of codes, of many rows at a time, and the inputs that they meet: so nothing changes
threads before the last sum, which costs more than loads of 16 bytes would save. Codes are not converted: a mask leaves
a word's bits of one code, and as a float these are a tiny number, exactly the code times a power of two, which the
inputs make up for; GPUs multiply such numbers as fast as others. Scales meet the sum of a word's products.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, N806
from __future__ import annotations

import triton
import triton.language as tl

from backend.compute.dense.packed_codes import steps
from backend.compute.dense.small_kernels import clamped, finish, kept, streamed


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
        # Words a thread each, like the inputs: as if they were not contiguous.
        at = tl.max_contiguous(codes + first[None, :] * (WIDTH // PER) + word[:, None], [1, 1])
        q = streamed(at, inside, EVEN)
        each = steps(scale + there, DIVIDES)
        low = _low(offset, there)
        if ACTIVATION != "":
            there = second[None, :] * (WIDTH // GROUP) + group
            at = tl.max_contiguous(codes + second[None, :] * (WIDTH // PER) + word[:, None], [1, 1])
            more_q = streamed(at, inside, EVEN)
            more_each = steps(scale + there, DIVIDES)
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
def _low(offset, there):
    """Without offsets something that is not used."""
    if offset is None:
        return there
    else:
        return tl.load(offset + there).to(tl.float32)


@triton.jit
def _dots(q, x, LEVELS: tl.constexpr):
    """Words [words, rows] by x [words, columns of a word] -> [words, rows], less by UNIT's power of two."""
    if LEVELS == 16:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], 2, 2, 2]))
        even_low, even_high = tl.split(even)  # columns 0 and 4, 2 and 6
        odd_low, odd_high = tl.split(odd)
        x0, x4 = tl.split(even_low)
        x2, x6 = tl.split(even_high)
        x1, x5 = tl.split(odd_low)
        x3, x7 = tl.split(odd_high)
        dots = _times(q, 4, 15, x0)  # the even column is the high half of its byte
        dots += _times(q, 0, 15, x1)
        dots += _times(q, 12, 15, x2)
        dots += _times(q, 8, 15, x3)
        dots += _times(q, 16, 15, x5)
        high = q >> 12  # no bit may come to where floats have their exponents
        dots += _times(high, 8, 15, x4)
        dots += _times(high, 16, 15, x6)
        return dots + _times(high, 12, 15, x7)
    else:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], 2, 2]))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        if LEVELS == 256:
            high = q >> 16
            dots = _times(q, 0, 255, x0) + _times(q, 8, 255, x1)
            return dots + _times(high, 0, 255, x2) + _times(high, 8, 255, x3)
        else:
            dots = _float_times(q << 24, x0) + _float_times(q << 16, x1)
            return dots + _float_times(q << 8, x2) + _float_times(q, x3)


@triton.jit
def _times(word, PLACE: tl.constexpr, MASK: tl.constexpr, x):
    """The code at this bit, times x, times 2 ** -69: as a float the lowest bit is 2 ** -149."""
    FACTOR: tl.constexpr = 2.0 ** (80 - PLACE)
    return (word & (MASK << PLACE)).to(tl.float32, bitcast=True) * (x * FACTOR)[:, None]


@triton.jit
def _float_times(word, x):
    """The fp8 code in the highest byte, times x, times 2 ** -60: exponents count from 7 there, from 127 in floats."""
    FACTOR: tl.constexpr = 2.0**60
    return ((word >> 4) & -0x78100000).to(tl.float32, bitcast=True) * (x * FACTOR)[:, None]


@triton.jit
def _meant(dots, alone, each, low, SYMMETRIC: tl.constexpr, LEVELS: tl.constexpr):
    """What the weights give: dots [words, rows], and alone [words, 1], the sums of x itself."""
    UNIT: tl.constexpr = 2.0**60 if LEVELS == 0 else 2.0**69
    if LEVELS == 0:
        return dots * (each * UNIT)
    elif SYMMETRIC:
        return (dots * UNIT - (LEVELS // 2) * alone) * each
    else:
        return dots * UNIT * each + low * alone
