"""Prefill attention: chunks of several tokens, each against its paged context. It does not know layers or models.

A tile is some tokens of one chunk times the heads of one kv head, with an online softmax over the context (as in
FlashAttention). The tiles with most context start first, so that none is left running alone.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from backend.compute.attention.base import Rule
from backend.compute.attention.step import Step
from backend.compute.attention.tiles import (
    FLOOR,
    HIDDEN,
    LOG2E,
    absorbed,
    context,
    finished,
    jit,
    padded,
    precision,
    scored,
)
from backend.compute.upload import upload


@dataclass(frozen=True, slots=True)
class Shape:
    """How the work is cut: rows are tokens times grouped heads, columns context tokens."""

    rows: int = 128
    columns: int = 64
    warps: int = 8
    stages: int = 3
    registers: int | None = None
    """The most that a thread may have, so that more programs fit on a multiprocessor."""


SHAPE = Shape(registers=128)
"""With 128 registers two programs share a multiprocessor."""
WIDE = Shape(rows=64, columns=32, warps=4)
"""For heads of more than 128."""
PLAIN = Shape(rows=32, columns=32, warps=4, stages=2)
"""For float32, which is multiplied without matrix units."""


def prefill(output: Tensor, query: Tensor, kv: Tensor, step: Step, rule: Rule) -> None:
    """Fills `output` [tokens, heads, dim] for the chunks of several tokens; query alike, kv as in the cache."""
    (_, heads, dim), kv_heads = query.shape, kv.shape[3]
    group = heads // kv_heads
    shape = _shape(query)
    rows = max(shape.rows, triton.next_power_of_2(group))
    tokens = rows // group
    tiles = step.once(("tiles", tokens), lambda: _tiles(step, tokens))
    _prefill_kernel[(kv_heads, len(tiles))](
        output, query, kv, rule.sinks, tiles, step.query_starts, step.kv_lengths, step.block_tables,
        rule.scaling, rule.softcap, query.stride(0), query.stride(1), kv.stride(0), kv.stride(1), kv.stride(2),
        kv.stride(3), step.block_tables.stride(0), rule.window,
        GROUP=group, DIM=dim, PADDED=padded(dim), BLOCK_SIZE=kv.shape[1], ROWS=rows, COLUMNS=shape.columns,
        TOKENS=tokens, WINDOWED=bool(rule.window), CAPPED=bool(rule.softcap), SINKS=rule.sinks is not None,
        PRECISION=precision(query.dtype), STAGES=shape.stages, num_warps=shape.warps, maxnreg=shape.registers,
    )  # fmt: skip


def _shape(query: Tensor) -> Shape:
    if query.dtype == torch.float32:
        return PLAIN
    return WIDE if query.shape[2] > 128 else SHAPE


def _tiles(step: Step, tokens: int) -> Tensor:
    """int32 [tiles, 2]: (chunk, its first token in the tile), those with most context first."""
    counts = np.diff(step.host_starts)
    per_chunk = np.where(counts > 1, -(-counts // tokens), 0)
    chunks = np.repeat(np.arange(len(counts)), per_chunk)
    firsts = (np.arange(len(chunks)) - np.repeat(np.cumsum(per_chunk) - per_chunk, per_chunk)) * tokens
    order = np.argsort(-(step.host_lengths - counts)[chunks] - firsts, kind="stable")
    tiles = np.stack([chunks, firsts], 1)[order].astype(np.int32)
    return upload(tiles, step.kv_slots.device)


@jit
def _prefill_kernel(
    output, query, kv, sinks, tiles, query_starts, kv_lengths, block_tables,
    scaling, softcap, query_token, query_head, kv_block, kv_slot, kv_value, kv_head, table_row, window,
    GROUP: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, TOKENS: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Row r of a tile is its token r // GROUP and head r % GROUP of this kv head."""
    head = tl.program_id(0)
    chunk = tl.load(tiles + tl.program_id(1) * 2)
    first = tl.load(tiles + tl.program_id(1) * 2 + 1)
    start = tl.load(query_starts + chunk)
    count = tl.load(query_starts + chunk + 1) - start
    length = tl.load(kv_lengths + chunk)

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, PADDED)
    in_chunk = first + rows // GROUP
    heads = head * GROUP + rows % GROUP
    live = (rows < TOKENS * GROUP) & (in_chunk < count)
    inside = live[:, None] & (dims < DIM)[None, :]
    token = (start + in_chunk).to(tl.int64)
    before = length - count + first  # the first row's position
    position = length - count + in_chunk
    q = tl.load(
        query + token[:, None] * query_token + heads[:, None] * query_head + dims[None, :], mask=inside, other=0.0
    )
    scale = LOG2E
    if not CAPPED:
        scale = scaling * LOG2E
    top = tl.full([ROWS], FLOOR, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, PADDED], tl.float32)
    table = block_tables + chunk.to(tl.int64) * table_row
    base = kv + head * kv_head

    begin = 0
    if WINDOWED:
        begin = tl.maximum(before - window + 1, 0) // COLUMNS * COLUMNS
    for at in tl.range(begin, tl.minimum(length, before + TOKENS), COLUMNS, num_stages=STAGES):
        columns = at + tl.arange(0, COLUMNS)
        k, v = context(
            base, table, columns, columns < length, kv_block, kv_slot, kv_value, DIM, PADDED, BLOCK_SIZE, PAIRED=False
        )
        scores = scored(q, k, scaling, softcap, CAPPED, PRECISION, PAIRED=False)
        if WINDOWED:
            seen = (columns[None, :] <= position[:, None]) & (columns[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, HIDDEN)
        elif at + COLUMNS > before + 1:  # else all rows see all of the tile
            scores = tl.where(columns[None, :] <= position[:, None], scores, HIDDEN)
        top, total, sums = absorbed(q, scores, scale, v, top, total, sums, PRECISION, PAIRED=False)

    result = finished(top, total, sums, sinks, heads, live, SINKS)
    row = token * (tl.num_programs(0) * GROUP) + heads
    tl.store(output + row[:, None] * DIM + dims[None, :], result.to(output.dtype.element_ty), mask=inside)
