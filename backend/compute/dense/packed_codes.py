"""Codes of packed weights as numbers in registers, for OpenAI-Triton kernels; which of them multiplies is not known."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803, N806
from __future__ import annotations

import triton
import triton.language as tl

LEVELS = {"int4": 16, "int8": 256, "fp8": 0}
"""What kernels know of a kind."""


@triton.jit
def numbers(q, PLACE: tl.constexpr, LEVELS: tl.constexpr, PAIRED: tl.constexpr):
    """One column of int16 that hold four of int4 or two of 8 bits each, exactly; integers less their middle.

    PAIRED: in bfloat16, two at a time by PTX; else in float32.
    """
    SHIFT: tl.constexpr = shift_of(LEVELS, PLACE)
    if PAIRED:
        return _placed(q, SHIFT, LEVELS)
    else:
        return _converted((q.to(tl.int32) >> SHIFT) & (15 if LEVELS == 16 else 255), LEVELS)


@triton.jit
def _converted(code, LEVELS: tl.constexpr):
    if LEVELS == 0:
        return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        return (code - LEVELS // 2).to(tl.float32)


@triton.jit
def _placed(q, SHIFT: tl.constexpr, LEVELS: tl.constexpr):
    return tl.inline_asm_elementwise(unpacking(LEVELS, SHIFT), "=r,r", [q], tl.bfloat16, True, 2)


@triton.constexpr_function
def unpacking(levels: int, shift: int) -> str:
    """PTX for two codes of a kind in the same place of two words of 16 bits, as two of bfloat16.

    Nothing is converted. An integer's bits go where 128, 0x4300, has its mantissa, whose last bit is 1; the eighth
    of int8, for which there is no room, chooses whether 128 or 256 is taken away. fp8's bits go where bfloat16 has the
    same, which makes them less by the difference of the exponents' bias, 2 ** 120 or 0x7B80. All by fma: before sm_90
    GPUs have nothing else for bfloat16.
    """
    if levels == 16:
        return f"""{{ .reg .b32 w, c, one; mov.b32 c, 0xC308C308; mov.b32 one, 0x3F803F80;
            shr.u32 w, $1, {shift}; lop3.b32 w, w, 0x000F000F, 0x43004300, 0xEA; fma.rn.bf16x2 $0, w, one, c; }}"""
    if levels == 256:
        return f"""{{ .reg .b32 w, c, one; mov.b32 one, 0x3F803F80; shr.u32 w, $1, {shift};
            lop3.b32 c, w, 0x00800080, 0xC380C380, 0x6A; lop3.b32 w, w, 0x007F007F, 0x43004300, 0xEA;
            fma.rn.bf16x2 $0, w, one, c; }}"""
    return f"""{{ .reg .b32 w, s, c, no; mov.b32 c, 0x7B807B80; mov.b32 no, 0x80008000;
        shl.b32 s, $1, {8 - shift}; shr.u32 w, s, 4; and.b32 w, w, 0x07F007F0;
        lop3.b32 w, s, 0x80008000, w, 0xEA; fma.rn.bf16x2 $0, w, c, no; }}"""


@triton.constexpr_function
def shift_of(levels: int, place: int) -> int:
    """Bits below the code that has this place among those of 16 bits; int4's high half of a byte is the first."""
    return place // 2 * 8 + 4 - place % 2 * 4 if levels == 16 else place * 8


SCALED = tl.constexpr("fma.rn.bf16x2 $0, $1, $2, $3;")
"""PTX for two weights: their codes by what each of them means, and what is added."""


@triton.jit
def scaled(w, each, middle, PAIRED: tl.constexpr):
    """The weights, w * each + middle; PAIRED: of bfloat16, rounded once."""
    if PAIRED:
        return tl.inline_asm_elementwise(SCALED, "=r,r,r,r", [w, each, middle], tl.bfloat16, True, 2)
    else:
        return w * each + middle


@triton.jit
def steps(at, DIVIDES: tl.constexpr, ROUGH: tl.constexpr = False):
    """What a code is to be multiplied with. ROUGH: within a unit in float32's last place, by PTX; a quarter of the
    instructions.
    """
    found = tl.load(at).to(tl.float32)
    if DIVIDES:
        if ROUGH:
            found = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [found], tl.float32, True, 1)
        else:
            found = 1.0 / found
    return found
