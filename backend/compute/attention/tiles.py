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


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def context(
    q, base, table, columns, known, kv_block, kv_slot, kv_value,
    DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Keys and values [columns, dim] of one kv head in the queries' type; zeros where a column is not known."""
    dims = tl.arange(0, PADDED)
    block = tl.load(table + columns // BLOCK_SIZE, mask=known, other=0)
    where = (block.to(tl.int64) * kv_block + (columns % BLOCK_SIZE) * kv_slot)[:, None] + dims[None, :]
    mask = known[:, None]
    if PADDED > DIM:
        mask = mask & (dims < DIM)[None, :]
    k = tl.load(base + where, mask=mask, other=0.0)
    v = tl.load(base + kv_value + where, mask=mask, other=0.0)
    return k.to(q.dtype), v.to(q.dtype)


@triton.jit
def scored(q, k, scaling, softcap, CAPPED: tl.constexpr, PRECISION: tl.constexpr):
    """Scores [rows, columns]; those under a cap are scaled already."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if CAPPED:  # softcap * tanh(scores * scaling / softcap)
        scores = softcap * (2.0 / (1.0 + tl.exp2(scores * (-2.0 * LOG2E * scaling / softcap))) - 1.0)
    return scores


@triton.jit
def absorbed(scores, scale, v, top, total, sums, PRECISION: tl.constexpr):
    """The running maximum, sum of weights and weighted sum of values after a tile more."""
    higher = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - higher[:, None])
    fade = tl.exp2(top - higher)
    total = total * fade + tl.sum(weights, 1)
    sums = tl.dot(weights.to(v.dtype), v, sums * fade[:, None], input_precision=PRECISION)
    return higher, total, sums


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
