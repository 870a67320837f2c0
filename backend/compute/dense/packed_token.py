"""One token's product with int4 weights by tensor cores, as an OpenAI-Triton kernel; it does not know what shapes it.

A tile is 16 rows by TILE columns and belongs to one warp. As tensor cores want it, a thread has CHUNK columns of two
rows, 16 bytes of each, and unpacks two codes at a time into the last bits of bfloat16 numbers around 128, which needs
no conversion. Inputs have no use for the eight columns of a product's other factor but one: so they keep the chunks
apart, whose groups differ in scale. Sums of the inputs, by ones in place of codes, take away 128 times too much.

Tensors are [threads], a place for each, and every step stays within it but for `mma` and the last sums. Of one
dimension they have one layout, the threads in order; else tensor cores would meet other numbers. A trial at load sees
that they do not (quantized/trial.py).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, N806
from __future__ import annotations

import triton
import triton.language as tl

from backend.compute.dense.packed_codes import steps
from backend.compute.dense.small_kernels import clamped, finish

ROWS = tl.constexpr(16)
CHUNK = tl.constexpr(32)
TILE = tl.constexpr(8 * CHUNK.value)

_MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"


def _codes_by_inputs() -> str:
    """A word of one row and of the row eight below it, eight columns each, by their inputs.

    Pairs as a word has them: columns 0 and 4, 1 and 5, 2 and 6, 3 and 7; the even one is the high half of its byte.
    """
    unpacked = [
        f"shr.u32 w, {word}, {shift}; lop3.b32 {row}{pair}, w, 0x000F000F, 0x43004300, 0xEA;"
        for word, row in (("$4", "a"), ("$5", "b"))
        for pair, shift in enumerate((4, 0, 12, 8))
    ]
    return f"""{{ .reg .b32 w, a<4>, b<4>; .reg .f32 c<4>; {" ".join(unpacked)}
        {_MMA} {{c0, c1, c2, c3}}, {{a0, b0, a1, b1}}, {{$6, $7}}, {{$10, $11, $12, $13}};
        {_MMA} {{$0, $1, $2, $3}}, {{a2, b2, a3, b3}}, {{$8, $9}}, {{c0, c1, c2, c3}}; }}"""


def _twice(first: str, second: str) -> str:
    """Two products of factors [16, 16] in these registers, of which the rows from the ninth on are not looked at."""
    return f"""{{ .reg .b32 one, no; .reg .f32 c<4>, d<2>, z;
        mov.b32 one, 0x3F803F80; mov.b32 no, 0; mov.f32 z, 0f00000000;
        {_MMA} {{c0, c1, c2, c3}}, {{{first}}}, {{$2, $3}}, {{$6, $7, z, z}};
        {_MMA} {{$0, $1, d0, d1}}, {{{second}}}, {{$4, $5}}, {{c0, c1, c2, c3}}; }}"""


CODES = tl.constexpr(_codes_by_inputs())
ONES = tl.constexpr(_twice("one, one, one, one", "one, one, one, one"))
SQUARES = tl.constexpr(_twice("$2, no, $3, no", "$4, no, $5, no"))


@triton.jit
def packed_token_kernel(
    result, x, codes, scale, offset, bias, residual, gain, eps, outputs,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, WARPS: tl.constexpr, DIVIDES: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """codes: int32, the bytes four at a time. GROUP and TILE divide the width, CHUNK a group."""
    TILES: tl.constexpr = WIDTH // TILE
    EVEN: tl.constexpr = TILES % WARPS == 0
    thread = tl.arange(0, WARPS * 32)
    warp, lane = thread // 32, thread % 32
    row = tl.program_id(0) * ROWS + lane // 4
    none = tl.zeros([WARPS * 32], tl.float32)
    upper, lower, gate_upper, gate_lower, even_square, odd_square = none, none, none, none, none, none
    for start in tl.range(0, TILES, WARPS):
        tile = start + warp
        live = lane // 4 % 4 == lane % 4  # it has its chunk's inputs, for the column that is its chunk's
        if not EVEN:
            live &= tile < TILES
            tile = tl.minimum(tile, TILES - 1)
        words = _words(codes, row, tile, lane, outputs, 0, WIDTH)
        if ACTIVATION != "":
            more_words = _words(codes, row, tile, lane, outputs, outputs, WIDTH)
        at = (tile * TILE + lane // 16 * (4 * CHUNK) + lane % 4 * CHUNK) // 2
        even_sum, odd_sum = none, none
        inputs = ()
        for eight in tl.static_range(4):
            x0, x2, x4, x6 = _four(x, at + 4 * eight, live)
            if gain is not None:
                even_square, odd_square = _two(SQUARES, x0, x2, x4, x6, even_square, odd_square)
                g0, g2, g4, g6 = _four(gain, at + 4 * eight, live)
                x0, x2, x4, x6 = _times(x0, g0), _times(x2, g2), _times(x4, g4), _times(x6, g6)
            pairs = (_halves(x0, x4, 0x5410), _halves(x0, x4, 0x7632), _halves(x2, x6, 0x5410), _halves(x2, x6, 0x7632))
            even_sum, odd_sum = _two(ONES, pairs[0], pairs[1], pairs[2], pairs[3], even_sum, odd_sum)
            inputs = inputs + pairs  # type: ignore[assignment]
        found, found_below = _meant(
            words, inputs, even_sum, odd_sum, scale, offset, row, tile, lane, outputs, 0, WIDTH, GROUP, DIVIDES
        )
        if ACTIVATION == "":
            upper += found
            lower += found_below
        else:
            gate_upper += found
            gate_lower += found_below
            found, found_below = _meant(
                more_words, inputs, even_sum, odd_sum, scale, offset, row, tile, lane, outputs, outputs,
                WIDTH, GROUP, DIVIDES,
            )  # fmt: skip
            upper += found
            lower += found_below
    norm = 1.0
    if gain is not None:  # squares are where a product's row and column are the same
        own = tl.where(lane // 8 == lane % 4, tl.where(lane // 4 % 2 == 0, even_square, odd_square), 0.0)
        norm = tl.rsqrt(tl.sum(own, 0) / WIDTH + eps)
    _end(result, upper, gate_upper, norm, bias, residual, 0, outputs, ACTIVATION)
    _end(result, lower, gate_lower, norm, bias, residual, 8, outputs, ACTIVATION)


@triton.jit
def _end(result, sums, gate_sums, norm, bias, residual, below, outputs, ACTIVATION: tl.constexpr):
    """Eight of a program's rows."""
    row = tl.program_id(0) * ROWS + below + tl.arange(0, 8)
    total, gate = _total(sums) * norm, _total(gate_sums) * norm
    finish(result, total, gate, bias, residual, row, row, row < outputs, outputs, ACTIVATION)


@triton.jit
def _total(sums):
    """[threads] -> [8]"""
    return tl.sum(tl.sum(tl.reshape(sums, [sums.shape[0] // 32, 8, 4]), 2), 0)


@triton.jit
def _words(codes, row, tile, lane, outputs, below, WIDTH: tl.constexpr):
    """Four words each, of the tile's first half and its second: of the row's chunk, and of that eight rows below."""
    at = tile * (TILE // 8) + lane % 4 * 4
    upper = codes + (clamped(row, outputs) + below) * (WIDTH // 8) + at
    lower = codes + (clamped(row + 8, outputs) + below) * (WIDTH // 8) + at
    return _streamed(upper), _streamed(lower), _streamed(upper + TILE // 16), _streamed(lower + TILE // 16)


@triton.jit
def _streamed(at):
    return _split(tl.load(at[:, None] + tl.arange(0, 4)[None, :], eviction_policy="evict_first"))


@triton.jit
def _four(at, index, live):
    """Four words of inputs, 0 if they are not live."""
    at = at.to(tl.pointer_type(tl.int32)) + index[:, None] + tl.arange(0, 4)[None, :]
    return _split(tl.load(at, mask=live[:, None], other=0, eviction_policy="evict_last"))


@triton.jit
def _split(words):
    """[threads, 4] -> four of [threads]"""
    even, odd = tl.split(tl.reshape(words, [words.shape[0], 2, 2]))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def _meant(
    words, inputs, even_sum, odd_sum, scale, offset, row, tile, lane, outputs, below,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, DIVIDES: tl.constexpr,
):  # fmt: skip
    """What the weights give: of the row, and of that eight below. A thread has the columns of two of eight chunks."""
    MIDDLE: tl.constexpr = 136 if offset is None else 128
    even, odd, even_below, odd_below = _half(words[0], words[1], inputs)
    more = _half(words[2], words[3], inputs)
    first = lane % 4 < 2
    even, odd = tl.where(first, even, more[0]), tl.where(first, odd, more[1])
    even_below, odd_below = tl.where(first, even_below, more[2]), tl.where(first, odd_below, more[3])
    group = (tile * 8 + lane % 4 * 2) * CHUNK // GROUP
    there = (clamped(row, outputs) + below) * (WIDTH // GROUP) + group
    there_below = (clamped(row + 8, outputs) + below) * (WIDTH // GROUP) + group
    even, odd = even - MIDDLE * even_sum, odd - MIDDLE * odd_sum
    even_below, odd_below = even_below - MIDDLE * even_sum, odd_below - MIDDLE * odd_sum
    return (
        _scaled(even, odd, even_sum, odd_sum, scale, offset, there, GROUP, DIVIDES),
        _scaled(even_below, odd_below, even_sum, odd_sum, scale, offset, there_below, GROUP, DIVIDES),
    )


@triton.jit
def _scaled(even, odd, even_sum, odd_sum, scale, offset, there, GROUP: tl.constexpr, DIVIDES: tl.constexpr):
    """Of two chunks, which are of one group if that is large."""
    if GROUP == CHUNK:
        two = there[:, None] + tl.arange(0, 2)[None, :]
        each, more_each = tl.split(steps(scale + two, DIVIDES, True))
        found = even * each + odd * more_each
        if offset is not None:
            low, more_low = tl.split(tl.load(offset + two).to(tl.float32))
            found += even_sum * low + odd_sum * more_low
    else:
        found = (even + odd) * steps(scale + there, DIVIDES, True)
        if offset is not None:
            found += (even_sum + odd_sum) * tl.load(offset + there).to(tl.float32)
    return found


@triton.jit
def _half(upper, lower, inputs):
    """Half a tile's codes by the inputs: of the row and the one eight below, for an even and an odd column each."""
    none = tl.zeros(upper[0].shape, tl.float32)
    even, odd, even_below, odd_below = none, none, none, none
    for word in tl.static_range(4):
        even, odd, even_below, odd_below = tl.inline_asm_elementwise(
            CODES, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
            [
                upper[word], lower[word], inputs[4 * word], inputs[4 * word + 1], inputs[4 * word + 2],
                inputs[4 * word + 3], even, odd, even_below, odd_below,
            ],
            (tl.float32, tl.float32, tl.float32, tl.float32), True, 1,
        )  # fmt: skip
    return even, odd, even_below, odd_below


@triton.jit
def _two(PTX: tl.constexpr, a, b, c, d, even, odd):
    """A product's even and odd column, of its first rows."""
    return tl.inline_asm_elementwise(
        PTX, "=f,=f,r,r,r,r,f,f", [a, b, c, d, even, odd], (tl.float32, tl.float32), True, 1
    )


@triton.jit
def _times(a, b):
    """Two of bfloat16 by two others."""
    return tl.inline_asm_elementwise("mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, True, 1)


@triton.jit
def _halves(a, b, WHICH: tl.constexpr):
    """The low halves of two words in one, or the high ones."""
    PTX: tl.constexpr = f"prmt.b32 $0, $1, $2, {WHICH};"
    return tl.inline_asm_elementwise(PTX, "=r,r,r", [a, b], tl.int32, True, 1)
