"""One token's product with packed weights as an OpenAI-Triton kernel; it does not know what shapes it.

A thread loads 16 bytes of codes of each of several rows, the scales that they share, and then the inputs that all of
them meet: nothing changes threads before the last sum. Integers are not converted: a mask leaves a word's bits of one
code, and as a float these are a tiny number, exactly the code times a power of two, which the inputs make up for; GPUs
multiply such numbers as fast as others. Scales meet the sum of the products of 16 bytes, or of a whole row.
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
    LEVELS: tl.constexpr, DIVIDES: tl.constexpr, ROUGH: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """codes: int32, the bytes four at a time; WORDS of them of each row at once. No four words are in two groups.

    ROUGH: see packed_codes.steps.
    """
    PER: tl.constexpr = 8 if LEVELS == 16 else 4
    EVEN: tl.constexpr = WIDTH % (WORDS * PER) == 0
    LATE: tl.constexpr = GROUP == WIDTH and offset is None
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, WORDS // 4], tl.float32)
    gate_sums = tl.zeros([ROWS, WORDS // 4], tl.float32)
    squares = tl.zeros([WORDS // 4], tl.float32)
    if LATE:
        whole = steps(scale + clamped(row, outputs), DIVIDES, ROUGH)
        if ACTIVATION != "":
            more_whole = steps(scale + clamped(row, outputs) + outputs, DIVIDES, ROUGH)
    for start in tl.range(0, WIDTH // PER, WORDS, num_stages=STAGES):
        q = _words(codes, outputs, 0, start, WIDTH // PER, ROWS, WORDS, EVEN, LEVELS)
        each, low = _scales(
            scale, offset, outputs, 0, start * PER, WIDTH, GROUP, ROWS, WORDS // 4, PER, EVEN, DIVIDES, ROUGH, LATE
        )
        if ACTIVATION != "":
            more_q = _words(codes, outputs, outputs, start, WIDTH // PER, ROWS, WORDS, EVEN, LEVELS)
            more_each, more_low = _scales(
                scale, offset, outputs, outputs, start * PER,
                WIDTH, GROUP, ROWS, WORDS // 4, PER, EVEN, DIVIDES, ROUGH, LATE,
            )  # fmt: skip
        if STAGES == 1:
            tl.debug_barrier()  # which no load passes: compilers would have the weights' wait for the inputs'
        x0, x1, x2, x3 = _inputs(x, start * PER, WIDTH, WORDS // 4, PER, EVEN)
        if gain is not None:
            squares += tl.sum(x0 * x0 + x1 * x1 + x2 * x2 + x3 * x3, 1)
            g0, g1, g2, g3 = _inputs(gain, start * PER, WIDTH, WORDS // 4, PER, EVEN)
            x0, x1, x2, x3 = x0 * g0, x1 * g1, x2 * g2, x3 * g3
        alone = tl.sum(x0 + x1 + x2 + x3, 1)[None, :]
        found = _meant(_dots(q, x0, x1, x2, x3, LEVELS), alone, each, low, offset is None, LEVELS)
        if ACTIVATION == "":
            sums += found
        else:
            gate_sums += found
            dots = _dots(more_q, x0, x1, x2, x3, LEVELS)
            sums += _meant(dots, alone, more_each, more_low, offset is None, LEVELS)
    norm = 1.0
    if gain is not None:
        norm = tl.rsqrt(tl.sum(squares, 0) / WIDTH + eps)
    total, gate = tl.sum(sums, 1) * norm, tl.sum(gate_sums, 1) * norm
    if LATE:
        gate *= whole
        total *= whole if ACTIVATION == "" else more_whole
    finish(result, total, gate, bias, residual, row, row, row < outputs, outputs, ACTIVATION)


@triton.jit
def _words(
    codes, outputs, below, start,
    LENGTH: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """[rows, words], of the program's rows and so many below them; of fp8 [rows, codes]."""
    SIZE: tl.constexpr = 4 if LEVELS == 0 else 1
    row = clamped(tl.program_id(0) * ROWS + tl.arange(0, ROWS), outputs) + below
    at = (start * SIZE + tl.arange(0, WORDS * SIZE))[None, :]
    if LEVELS == 0:
        codes = codes.to(tl.pointer_type(tl.float8e4nv))
    return streamed(codes + row[:, None] * (LENGTH * SIZE) + at, at < LENGTH * SIZE, EVEN)


@triton.jit
def _scales(
    scale, offset, outputs, below, start,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, FOURS: tl.constexpr, PER: tl.constexpr,
    EVEN: tl.constexpr, DIVIDES: tl.constexpr, ROUGH: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """[rows, fours], of each four words; 1 if the scale is for later, and something unused if there is no offset.

    Loaded in one dimension, as if they were not contiguous: so by the threads that have the words.
    """
    place = tl.arange(0, ROWS * FOURS)
    row = clamped(tl.program_id(0) * ROWS + place // FOURS, outputs) + below
    group = (start + place % FOURS * (4 * PER)) // GROUP
    if not EVEN:
        group = tl.minimum(group, WIDTH // GROUP - 1)
    there = tl.max_contiguous(row * (WIDTH // GROUP) + group, 1)
    each = 1.0
    if not LATE:
        each = tl.reshape(steps(scale + there, DIVIDES, ROUGH), [ROWS, FOURS])
    low = each
    if offset is not None:
        low = tl.reshape(tl.load(offset + there).to(tl.float32), [ROWS, FOURS])
    return each, low


@triton.jit
def _inputs(x, start, WIDTH: tl.constexpr, FOURS: tl.constexpr, PER: tl.constexpr, EVEN: tl.constexpr):
    """What the first, second, third and fourth words of fours meet: [fours, columns of a word] each."""
    at = start + tl.arange(0, FOURS)[:, None] * (4 * PER) + tl.arange(0, PER)[None, :]
    x0 = kept(x + at, at < WIDTH, EVEN).to(tl.float32)
    x1 = kept(x + at + PER, at + PER < WIDTH, EVEN).to(tl.float32)
    x2 = kept(x + at + 2 * PER, at + 2 * PER < WIDTH, EVEN).to(tl.float32)
    x3 = kept(x + at + 3 * PER, at + 3 * PER < WIDTH, EVEN).to(tl.float32)
    return x0, x1, x2, x3


@triton.jit
def _dots(q, x0, x1, x2, x3, LEVELS: tl.constexpr):
    """What _words loaded by what it meets -> [rows, fours], of integers less by UNIT's power of two."""
    ROWS: tl.constexpr = q.shape[0]
    FOURS: tl.constexpr = x0.shape[0]
    if LEVELS == 0:
        q = tl.permute(tl.reshape(q.to(tl.float32), [ROWS, FOURS, 2, 2, 4]), (0, 1, 4, 2, 3))
    else:
        q = tl.reshape(q, [ROWS, FOURS, 2, 2])
    even, odd = tl.split(q)
    q0, q2 = tl.split(even)
    q1, q3 = tl.split(odd)
    dots = tl.zeros([ROWS, FOURS], tl.float32)
    dots = _dot(dots, q0, x0, LEVELS)
    dots = _dot(dots, q1, x1, LEVELS)
    dots = _dot(dots, q2, x2, LEVELS)
    return _dot(dots, q3, x3, LEVELS)


@triton.jit
def _dot(dots, q, x, LEVELS: tl.constexpr):
    """And one word of each four, [rows, fours], by its inputs [fours, columns of a word]; fp8: [rows, fours, 4]."""
    if LEVELS == 16:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], 2, 2, 2]))
        even_low, even_high = tl.split(even)  # columns 0 and 4, 2 and 6
        odd_low, odd_high = tl.split(odd)
        x0, x4 = tl.split(even_low)
        x2, x6 = tl.split(even_high)
        x1, x5 = tl.split(odd_low)
        x3, x7 = tl.split(odd_high)
        dots += _times(q, 4, 15, x0)  # the even column is the high half of its byte
        dots += _times(q, 0, 15, x1)
        dots += _times(q, 12, 15, x2)
        dots += _times(q, 8, 15, x3)
        dots += _times(q, 16, 15, x5)
        high = q >> 12  # no bit may come to where floats have their exponents
        dots += _times(high, 8, 15, x4)
        dots += _times(high, 16, 15, x6)
        dots += _times(high, 12, 15, x7)
    else:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], 2, 2]))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        if LEVELS == 256:
            high = q >> 16
            dots += _times(q, 0, 255, x0)
            dots += _times(q, 8, 255, x1)
            dots += _times(high, 0, 255, x2)
            dots += _times(high, 8, 255, x3)
        else:
            even, odd = tl.split(tl.reshape(q, [q.shape[0], q.shape[1], 2, 2]))
            q0, q2 = tl.split(even)
            q1, q3 = tl.split(odd)
            dots += q0 * x0[None, :]
            dots += q1 * x1[None, :]
            dots += q2 * x2[None, :]
            dots += q3 * x3[None, :]
    return dots


@triton.jit
def _times(word, PLACE: tl.constexpr, MASK: tl.constexpr, x):
    """The code at this bit, times x, times 2 ** -69: as a float the lowest bit is 2 ** -149."""
    FACTOR: tl.constexpr = 2.0 ** (80 - PLACE)
    return (word & (MASK << PLACE)).to(tl.float32, bitcast=True) * (x * FACTOR)[None, :]


@triton.jit
def _meant(dots, alone, each, low, SYMMETRIC: tl.constexpr, LEVELS: tl.constexpr):
    """What the weights give: dots [rows, fours], and alone [1, fours], the sums of x itself."""
    UNIT: tl.constexpr = 2.0**69
    if LEVELS == 0:
        return dots * each
    elif SYMMETRIC:
        return (dots * UNIT - (LEVELS // 2) * alone) * each
    else:
        return dots * UNIT * each + low * alone
