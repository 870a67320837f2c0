"""What the decode and the prefill kernel share: reading a tile of the paged context, and the online softmax.

Scores are kept in powers of two: `scale` is the rule's scaling times log2(e).
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
HALVES = tl.constexpr("""{
    .reg .b16 even, odd, high;
    .reg .b32 each;
    prmt.b32 each, $2, 0, 0x4420;
    mov.b32 {even, high}, each;
    cvt.rn.f16x2.e4m3x2 $0, even;
    prmt.b32 each, $2, 0, 0x4431;
    mov.b32 {odd, high}, each;
    cvt.rn.f16x2.e4m3x2 $1, odd;
}""")
SMALLEST = tl.constexpr(1e-30)
LOG2E = tl.constexpr(1.4426950408889634)
HIDDEN = tl.constexpr(float("-inf"))
"""The score of what a row does not see. A large finite one would not do: `score * scale - top` is computed as one, and
beside it the rounding of `top` alone, then far above 2 ** 7, may make exp2 infinite where a row sees nothing yet."""
FLOOR = tl.constexpr(-1e30)
"""The running maximum of a row that has seen nothing: below any score, yet finite, so that its weights come to 0."""


def jit(function: Callable[..., Any]) -> Any:
    """Compiled anew for other types and alignments, not for what differs from step to step: serving would stall."""
    return triton.jit(
        function,
        do_not_specialize=["table_row", "table_width", "window", "chunks"],
        do_not_specialize_on_alignment=["tiles", "query_starts", "kv_lengths", "block_tables", "slots"],
    )


@triton.jit
def stored(values, kv):
    """The values as the cache keeps them; beyond the range of float8 its largest value."""
    if kv.dtype.element_ty == tl.float8e4nv:
        values = tl.clamp(values.to(tl.float32), -448.0, 448.0)
    return values.to(kv.dtype.element_ty)


def dense(tensor: Tensor) -> Tensor:
    """The same values with the head's dimension contiguous, as models nearly always have it."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def padded(dim: int) -> int:
    """Powers of two from 16 on, which is what tl.dot takes."""
    return max(16, int(triton.next_power_of_2(dim)))


def columns_of(wide: int, query: Tensor, kv: Tensor, tile_bytes: int) -> int:
    """Context tokens of a tile: few values, so that shared memory is used alike for all types and head sizes.

    A cache of a narrower type than the queries' is widened to it in registers, which the wider one must fit.
    """
    return max(16, min(128, tile_bytes // (wide * max(query.itemsize, kv.itemsize))))


def paired(query: Tensor, kv: Tensor) -> bool:
    """Whether a cache of float8 is read two values at a time, as one integer of 16 bits: see `halves`."""
    return kv.dtype == torch.float8_e4m3fn and query.itemsize == 2 and query.shape[2] % 32 == 0


def readable(kv: Tensor, pairs: bool) -> Tensor:
    return kv.view(torch.int16) if pairs else kv


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def asked(query, token, heads, live, query_head, DIM: tl.constexpr, PADDED: tl.constexpr, PAIRED: tl.constexpr):
    """Queries [rows, dim] of one token. For pairs: those of even and of odd dimensions in float16, and by how much.

    A row is divided by the power of two at its largest value, to fit float16 whatever it is; `scored` multiplies again.
    """
    if PAIRED:
        dims = tl.arange(0, PADDED // 2) * 2
        inside = live[:, None] & (dims < DIM)[None, :]
        where = query + token + heads[:, None] * query_head + dims[None, :]
        even = tl.load(where, mask=inside, other=0.0).to(tl.float32)
        odd = tl.load(where + 1, mask=inside, other=0.0).to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(even), 1), tl.max(tl.abs(odd), 1))
        power = (tl.maximum(largest, SMALLEST).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        q = (even / power[:, None]).to(tl.float16), (odd / power[:, None]).to(tl.float16), power
    else:
        dims = tl.arange(0, PADDED)
        inside = live[:, None] & (dims < DIM)[None, :]
        q = tl.load(query + token + heads[:, None] * query_head + dims[None, :], mask=inside, other=0.0)
    return q


@triton.jit
def halves(pairs):
    """The even and the odd values of float8 pairs, in float16, which holds them all.

    Matrix units take 16 bits, and what transposes tiles on their way there moves 16 bits: in bytes, values would be
    picked one by one, and bfloat16 takes two conversions each, the second at a sixteenth of the usual rate.
    """
    if INTERPRETED:
        even = (pairs & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
        odd = ((pairs >> 8) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        even, odd = tl.inline_asm_elementwise(HALVES, "=r,=r,r", [pairs], (tl.float16, tl.float16), True, 2)
    return even, odd


@triton.jit
def context(
    base, table, columns, known, kv_block, kv_slot, kv_value,
    DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """Keys and values [columns, dim] of one kv head as they are kept; zeros where a column is not known."""
    block = tl.load(table + columns // BLOCK_SIZE, mask=known, other=0)
    return found(base, block, columns, known, kv_block, kv_slot, kv_value, DIM, PADDED, BLOCK_SIZE, PAIRED)


@triton.jit
def found(
    base, block, columns, known, kv_block, kv_slot, kv_value,
    DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """The same in blocks that are known already."""
    if PAIRED:
        dims = tl.arange(0, PADDED // 2)
        inside = dims < DIM // 2
    else:
        dims = tl.arange(0, PADDED)
        inside = dims < DIM
    where = (block.to(tl.int64) * kv_block + (columns % BLOCK_SIZE) * kv_slot)[:, None] + dims[None, :]
    mask = known[:, None]
    if PADDED > DIM:
        mask = mask & inside[None, :]
    k = tl.load(base + where, mask=mask, other=0.0)
    v = tl.load(base + kv_value + where, mask=mask, other=0.0)
    return k, v


@triton.jit
def scored(q, k, scaling, softcap, CAPPED: tl.constexpr, PRECISION: tl.constexpr, PAIRED: tl.constexpr):
    """Scores [rows, columns]; those under a cap are scaled already."""
    if PAIRED:
        even, odd, power = q
        k_even, k_odd = halves(k)
        scores = tl.dot(odd, tl.trans(k_odd), tl.dot(even, tl.trans(k_even))) * power[:, None]
    else:
        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision=PRECISION)
    if CAPPED:  # softcap * tanh(scores * scaling / softcap)
        scores = softcap * (2.0 / (1.0 + tl.exp2(scores * (-2.0 * LOG2E * scaling / softcap))) - 1.0)
    return scores


@triton.jit
def nothing(ROWS: tl.constexpr, PADDED: tl.constexpr, PAIRED: tl.constexpr):
    """The running maximum, sum of weights and weighted sum of values before the first tile."""
    if PAIRED:
        sums = tl.zeros([ROWS, PADDED // 2], tl.float32), tl.zeros([ROWS, PADDED // 2], tl.float32)
    else:
        sums = tl.zeros([ROWS, PADDED], tl.float32)
    return tl.full([ROWS], FLOOR, tl.float32), tl.zeros([ROWS], tl.float32), sums


@triton.jit
def absorbed(q, scores, scale, v, top, total, sums, PRECISION: tl.constexpr, PAIRED: tl.constexpr):
    """The same after a tile more."""
    higher = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - higher[:, None])
    fade = tl.exp2(top - higher)
    total = total * fade + tl.sum(weights, 1)
    if PAIRED:
        even, odd = sums
        v_even, v_odd = halves(v)
        weights = weights.to(tl.float16)
        sums = tl.dot(weights, v_even, even * fade[:, None]), tl.dot(weights, v_odd, odd * fade[:, None])
    else:
        v = v.to(q.dtype)
        sums = tl.dot(weights.to(v.dtype), v, sums * fade[:, None], input_precision=PRECISION)
    return higher, total, sums


@triton.jit
def together(sums, ROWS: tl.constexpr, PADDED: tl.constexpr, PAIRED: tl.constexpr):
    """Sums [rows, dim]."""
    if PAIRED:
        even, odd = sums
        sums = tl.reshape(tl.join(even, odd), [ROWS, PADDED])
    return sums


@triton.jit
def finished(top, total, sums, sinks, heads, live, SINKS: tl.constexpr):
    """What the rows give, after their sinks took part; zeros for a row that saw nothing."""
    if SINKS:
        sink = tl.load(sinks + heads, mask=live, other=0.0).to(tl.float32) * LOG2E
        higher = tl.maximum(top, sink)
        fade = tl.exp2(top - higher)
        sums = sums * fade[:, None]
        total = total * fade + tl.exp2(sink - higher)
    return sums / counted(total)[:, None]


@triton.jit
def counted(total):
    """What to divide by: 1 where nothing was seen."""
    return tl.where(total == 0.0, 1.0, total)
