"""Decode attention for few sequences: each one's context is split over programs, joined by a second launch.

The time is that of one program's chain of dependent reads, so there are many short ones: tile t of a (row, kv head)
pair belongs to split t % splits, whose first tile needs no length to find its block numbers and no loop. How many
splits there are depends on rows, heads and processors alone; those beyond a row's length, which is read on the device,
end at once: a CUDA graph may hold the launches.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
from __future__ import annotations

from dataclasses import dataclass

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
    asked,
    columns_of,
    context,
    counted,
    found,
    jit,
    nothing,
    padded,
    paired,
    precision,
    processors,
    readable,
    scored,
    together,
)


@dataclass(frozen=True, slots=True)
class Shape:
    """How the work is cut."""

    tile_bytes: int = 8 << 10
    """Keys of one tile; the values are as many again. Small, so that a thousand tokens are work for many programs."""
    warps: int = 4
    stages: int = 5
    """Of the tiles after a program's first."""
    per_processor: int = 4
    """Programs to a multiprocessor, where every split has work."""
    least: int = 4
    """Fewer splits than this are left to the decode kernel of a fixed grid."""
    most: int = 64
    """Splits that one program joins."""
    registers: int | None = None
    join_warps: int = 4


SHAPE = Shape()


def splits(step: Step, kv_heads: int) -> int:
    """Programs to a pair, a power of two, as each is a kernel to compile; 0: the pairs are many enough as they are."""
    if not step.decode:
        return 0
    programs = processors(step.kv_lengths.device) * SHAPE.per_processor
    count = min(SHAPE.most, programs // (len(step.kv_lengths) * kv_heads))
    return 1 << (count.bit_length() - 1) if count >= SHAPE.least else 0


def split(output: Tensor, query: Tensor, kv: Tensor, step: Step, rule: Rule, count: int) -> None:
    """Fills `output` [tokens, heads, dim] of a decode step by `count` programs to a pair; query alike."""
    (tokens, heads, dim), kv_heads = query.shape, kv.shape[3]
    group, wide, sinks = heads // kv_heads, padded(dim), rule.sinks is not None
    partial = torch.empty(tokens, heads, count, dim, dtype=torch.float32, device=query.device)
    weight = torch.empty(tokens, heads, count, dtype=torch.float32, device=query.device)
    columns, pairs = columns_of(wide, query, kv, SHAPE.tile_bytes), paired(query, kv)
    kv = readable(kv, pairs)
    _split_kernel[(kv_heads, count, tokens)](
        partial, weight, query, kv, step.kv_lengths, step.block_tables, rule.scaling, rule.softcap,
        query.stride(0), query.stride(1), kv.stride(0), kv.stride(1), kv.stride(2), kv.stride(3),
        step.block_tables.stride(0), step.block_tables.shape[1], rule.window,
        GROUP=group, DIM=dim, PADDED=wide, BLOCK_SIZE=kv.shape[1], ROWS=max(16, triton.next_power_of_2(group)),
        COLUMNS=columns, WINDOWED=bool(rule.window), CAPPED=bool(rule.softcap), PRECISION=precision(query.dtype),
        PAIRED=pairs, STAGES=SHAPE.stages, num_warps=SHAPE.warps, maxnreg=SHAPE.registers,
    )  # fmt: skip
    _join_kernel[(heads, tokens)](
        output, partial, weight, rule.sinks, step.kv_lengths, rule.window,
        DIM=dim, PADDED=wide, COLUMNS=columns, SPLITS=count, WINDOWED=bool(rule.window), SINKS=sinks,
        num_warps=SHAPE.join_warps,
    )  # fmt: skip


@triton.jit
def _stretch(length, window, COLUMNS: tl.constexpr, WINDOWED: tl.constexpr):
    """Where the first tile of a row begins, and how many there are."""
    begin = 0
    if WINDOWED:
        begin = tl.maximum(length - window, 0) // COLUMNS * COLUMNS
    return begin, tl.cdiv(length - begin, COLUMNS)


@jit
def _split_kernel(
    partial, weight, query, kv, kv_lengths, block_tables, scaling, softcap, query_token, query_head,
    kv_block, kv_slot, kv_value, kv_head, table_row, table_width, window,
    GROUP: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
    PAIRED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Row r of the tiles is the r-th head of the kv head's group; heads are the fastest: they lie side by side."""
    head, split, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    splits = tl.num_programs(1)
    table = block_tables + chunk * table_row
    length = tl.load(kv_lengths + chunk)
    columns = split * COLUMNS + tl.arange(0, COLUMNS)
    block = tl.zeros([COLUMNS], tl.int32)
    if not WINDOWED:
        block = tl.load(table + columns // BLOCK_SIZE, mask=columns < table_width * BLOCK_SIZE, other=0)
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, PADDED)
    inside = (rows < GROUP)[:, None] & (dims < DIM)[None, :]
    heads = head * GROUP + rows
    q = asked(query, chunk * query_token, heads, rows < GROUP, query_head, DIM, PADDED, PAIRED)
    scale = LOG2E
    if not CAPPED:
        scale = scaling * LOG2E
    begin, tiles = _stretch(length, window, COLUMNS, WINDOWED)
    if split < tiles:
        base = kv + head * kv_head
        columns += begin
        known = columns < length
        if WINDOWED:
            block = tl.load(table + columns // BLOCK_SIZE, mask=known, other=0)
        k, v = found(base, block, columns, known, kv_block, kv_slot, kv_value, DIM, PADDED, BLOCK_SIZE, PAIRED)
        scores = scored(q, k, scaling, softcap, CAPPED, PRECISION, PAIRED)
        visible = known
        if WINDOWED:
            visible = known & (columns >= length - window)
        scores = tl.where(visible[None, :], scores, HIDDEN)
        top, total, sums = nothing(ROWS, PADDED, PAIRED)
        top, total, sums = absorbed(q, scores, scale, v, top, total, sums, PRECISION, PAIRED)
        for tile in tl.range(split + splits, tiles, splits, num_stages=STAGES):
            columns = begin + tile * COLUMNS + tl.arange(0, COLUMNS)
            known = columns < length
            k, v = context(base, table, columns, known, kv_block, kv_slot, kv_value, DIM, PADDED, BLOCK_SIZE, PAIRED)
            # Only the first tile of a row, a split's first, may reach beyond its window.
            scores = tl.where(known[None, :], scored(q, k, scaling, softcap, CAPPED, PRECISION, PAIRED), HIDDEN)
            top, total, sums = absorbed(q, scores, scale, v, top, total, sums, PRECISION, PAIRED)
        sums = together(sums, ROWS, PADDED, PAIRED)
        row = (chunk * (tl.num_programs(0) * GROUP) + heads) * splits + split
        tl.store(partial + row[:, None] * DIM + dims[None, :], sums / counted(total)[:, None], mask=inside)
        tl.store(weight + row, top + tl.log2(counted(total)), mask=rows < GROUP)


@jit
def _join_kernel(
    output, partial, weight, sinks, kv_lengths, window,
    DIM: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, WINDOWED: tl.constexpr,
    SINKS: tl.constexpr,
):  # fmt: skip
    """One program weighs one row's and head's parts by the sums behind them; a row without context gives zeros."""
    head, chunk = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = chunk * tl.num_programs(0) + head
    _begin, tiles = _stretch(tl.load(kv_lengths + chunk), window, COLUMNS, WINDOWED)
    parts = tl.arange(0, SPLITS)
    dims = tl.arange(0, PADDED)
    there = parts < tiles
    at = row * SPLITS + parts
    logs = tl.load(weight + at, mask=there, other=float("-inf"))
    values = tl.load(
        partial + at[:, None] * DIM + dims[None, :], mask=there[:, None] & (dims < DIM)[None, :], other=0.0
    )
    top = tl.maximum(tl.max(logs, 0), FLOOR)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    shares = tl.exp2(logs - top)
    total = tl.sum(shares, 0)
    if SINKS:
        total += tl.exp2(sink - top)
    result = tl.sum(values * shares[:, None], 0) / counted(total)
    tl.store(output + row * DIM + dims, result.to(output.dtype.element_ty), mask=dims < DIM)
