"""Decode attention: chunks of one token, each against its whole paged context. It does not know layers or models.

The time is that of reading the context once, so the work is shared out by bytes: all tiles of all (chunk, kv head)
pairs stand in one row, and each program of a fixed grid takes an equal stretch of it, however the lengths differ and
however long the longest may become. Lengths are read on the device: a CUDA graph may hold the launch. A pair that
several programs share is joined by the one that arrives last (split-KV, as in Flash-Decoding).
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
    finished,
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

    tile_bytes: int = 16 << 10
    """Keys of one tile; the values are as many again."""
    warps: int = 4
    stages: int = 5
    """Every two beyond the first are one tile in flight: the block numbers are a stage of their own."""
    per_processor: int = 2
    """Programs to a multiprocessor; more than fit at once would run as a second wave."""
    least: int = 1
    """Tiles that are worth a program."""


SHAPE = Shape()
NARROW = Shape(per_processor=3)
"""For heads of up to 64, where there is more than a pair a program: a step of a 1B took 3.78 ms with it and 3.92 with
two at 256 sequences, but 1.53 and 1.43 at 32, whose 256 pairs two come out even for (H200).

Also for pairs of float8, whose tiles take the time of half their bytes in bfloat16 and need fewer registers.
"""
JOINED = 8192
"""Partial results held at once while joining."""


def decode(output: Tensor, query: Tensor, kv: Tensor, step: Step, rule: Rule) -> None:
    """Fills `output` [tokens, heads, dim] for the chunks of one token; query alike, kv as in the cache."""
    chunks, (_, heads, dim), kv_heads = len(step.kv_lengths), query.shape, kv.shape[3]
    group, wide = heads // kv_heads, padded(dim)
    rows = max(16, triton.next_power_of_2(group))
    pairs = paired(query, kv)
    several = chunks * kv_heads > processors(query.device) * SHAPE.per_processor
    shape = NARROW if several and (wide <= 64 or pairs) else SHAPE
    columns, kv = columns_of(wide, query, kv, shape.tile_bytes), readable(kv, pairs)
    programs = processors(query.device) * shape.per_processor
    partial = torch.empty(programs * 2, group, dim, dtype=torch.float32, device=query.device)
    weight = torch.empty(programs * 2, group, dtype=torch.float32, device=query.device)
    _decode_kernel[(programs,)](
        output, partial, weight, _arrivals(step, kv_heads), query, kv, rule.sinks, step.query_starts, step.kv_lengths,
        step.block_tables, rule.scaling, rule.softcap, query.stride(0), query.stride(1), kv.stride(0), kv.stride(1),
        kv.stride(2), kv.stride(3), step.block_tables.stride(0), rule.window, chunks,
        KV_HEADS=kv_heads, GROUP=group, DIM=dim, PADDED=wide, BLOCK_SIZE=kv.shape[1],
        ROWS=rows, COLUMNS=columns, CHUNKS=_chunks(chunks),
        GROUPS=triton.next_power_of_2(group), PARTS=_parts(group, wide), LEAST=shape.least,
        WINDOWED=bool(rule.window), CAPPED=bool(rule.softcap), SINKS=rule.sinks is not None,
        PRECISION=precision(query.dtype), PAIRED=pairs, STAGES=shape.stages, num_warps=shape.warps,
        maxnreg=_registers(shape) if rows == 16 else None,
    )  # fmt: skip


def _registers(shape: Shape) -> int:
    """Registers a thread may have so that all programs fit at once. What it then spills lies outside the inner loop."""
    return min(255, (1 << 16) // (32 * shape.warps * shape.per_processor) // 8 * 8)


def _arrivals(step: Step, kv_heads: int) -> Tensor:
    """int32 [chunks * kv heads], how many programs have put their part of a pair; 0 again after every launch."""
    count = len(step.kv_lengths) * kv_heads
    return step.once(
        ("arrivals", kv_heads), lambda: torch.zeros(count, dtype=torch.int32, device=step.kv_lengths.device)
    )


def _chunks(chunks: int) -> int:
    """A power of two from 64 on, by eights: each value is a kernel to compile."""
    size = 64
    while size < chunks:
        size *= 8
    return size


def _parts(group: int, wide: int) -> int:
    return max(1, min(64, JOINED // (int(triton.next_power_of_2(group)) * wide)))


@jit
def _decode_kernel(
    output, partial, weight, arrivals, query, kv, sinks, query_starts, kv_lengths, block_tables,
    scaling, softcap, query_token, query_head, kv_block, kv_slot, kv_value, kv_head, table_row, window, chunks,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr,
    LEAST: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SINKS: tl.constexpr,
    PRECISION: tl.constexpr, PAIRED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A pair is a chunk and a kv head; row r of its tiles is the r-th head of that kv head's group.

    Chunks of several tokens have no tiles here.
    """
    each = tl.arange(0, CHUNKS)
    lengths = tl.load(kv_lengths + each, mask=each < chunks, other=0)
    seen = lengths
    if WINDOWED:
        seen -= tl.maximum(lengths - window, 0) // COLUMNS * COLUMNS
    tiles = tl.maximum(tl.cdiv(seen, COLUMNS), 1)  # a padding row takes one, to write zeros
    starts = tl.load(query_starts + each, mask=each < chunks, other=0)
    alone = tl.load(query_starts + each + 1, mask=each < chunks, other=0) - starts == 1
    tiles = tl.where(alone, tiles, 0)
    ends = tl.cumsum(tiles, 0) * KV_HEADS
    all_tiles = tl.sum(tiles, 0) * KV_HEADS
    share = tl.maximum(tl.cdiv(all_tiles, tl.num_programs(0)), LEAST)
    at = tl.program_id(0) * share
    stop = tl.minimum(at + share, all_tiles)

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, PADDED)
    live = rows < GROUP
    inside = live[:, None] & (dims < DIM)[None, :]
    scale = LOG2E
    if not CAPPED:
        scale = scaling * LOG2E
    while at < stop:
        chunk = tl.sum((ends <= at).to(tl.int32), 0)
        mine = each == chunk
        count = tl.sum(tl.where(mine, tiles, 0), 0)
        length = tl.sum(tl.where(mine, lengths, 0), 0)
        before = tl.sum(tl.where(mine, ends, 0), 0) - count * KV_HEADS
        head = (at - before) // count
        pair = before + head * count  # its first tile
        first = at - pair
        last = tl.minimum(count, stop - pair)
        token = tl.sum(tl.where(mine, starts, 0), 0).to(tl.int64)
        heads = head * GROUP + rows
        q = asked(query, token * query_token, heads, live, query_head, DIM, PADDED, PAIRED)
        top, total, sums = _weighed(
            q, kv + head * kv_head, block_tables + chunk.to(tl.int64) * table_row, first, last, length,
            scaling, softcap, scale, kv_block, kv_slot, kv_value, window,
            DIM, PADDED, BLOCK_SIZE, ROWS, COLUMNS, WINDOWED, CAPPED, PRECISION, PAIRED, STAGES,
        )  # fmt: skip
        out = output + (token * KV_HEADS + head) * GROUP * DIM
        if last - first == count:
            result = finished(top, total, sums, sinks, heads, live, SINKS)
            tl.store(out + rows[:, None] * DIM + dims[None, :], result.to(output.dtype.element_ty), mask=inside)
        else:
            slot = tl.program_id(0) * 2 + (first == 0).to(tl.int32)
            part = (slot * GROUP + rows)[:, None] * DIM + dims[None, :]
            tl.store(partial + part, sums / counted(total)[:, None], mask=inside)
            tl.store(weight + slot * GROUP + rows, top + tl.log2(counted(total)), mask=live)
            tl.debug_barrier()  # all threads' stores come before the arrival is told
            from_program = pair // share
            to_program = (pair + count - 1) // share
            arrival = arrivals + chunk * KV_HEADS + head
            if tl.atomic_add(arrival, 1) == to_program - from_program:
                tl.store(arrival, 0)
                _join(
                    out,
                    partial,
                    weight,
                    sinks,
                    head,
                    from_program,
                    to_program,
                    GROUP,
                    GROUPS,
                    DIM,
                    PADDED,
                    PARTS,
                    SINKS,
                )
        at = pair + last


@triton.jit
def _weighed(
    q, base, table, first, last, length, scaling, softcap, scale, kv_block, kv_slot, kv_value, window,
    DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, PAIRED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """The online softmax over the tiles from `first` to `last` of a pair."""
    top, total, sums = nothing(ROWS, PADDED, PAIRED)
    begin = 0
    if WINDOWED:
        begin = tl.maximum(length - window, 0) // COLUMNS * COLUMNS
    for tile in tl.range(first, last, num_stages=STAGES):
        columns = begin + tile * COLUMNS + tl.arange(0, COLUMNS)
        known = columns < length
        k, v = context(base, table, columns, known, kv_block, kv_slot, kv_value, DIM, PADDED, BLOCK_SIZE, PAIRED)
        scores = scored(q, k, scaling, softcap, CAPPED, PRECISION, PAIRED)
        visible = known
        if WINDOWED:
            visible = known & (columns >= length - window)
        scores = tl.where(visible[None, :], scores, HIDDEN)
        top, total, sums = absorbed(q, scores, scale, v, top, total, sums, PRECISION, PAIRED)
    return top, total, together(sums, ROWS, PADDED, PAIRED)


@triton.jit
def _join(
    out, partial, weight, sinks, head, from_program, to_program,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, PARTS: tl.constexpr,
    SINKS: tl.constexpr,
):  # fmt: skip
    """Weigh the programs' results of a pair by the sums behind them. Only the first began with the pair (slot 1)."""
    rows = tl.arange(0, GROUPS)
    dims = tl.arange(0, PADDED)
    live = rows < GROUP
    inside = live[:, None] & (dims < DIM)[None, :]
    top = tl.full([GROUPS], FLOOR, tl.float32)
    total = tl.zeros([GROUPS], tl.float32)
    sums = tl.zeros([GROUPS, PADDED], tl.float32)
    for at in range(from_program, to_program + 1, PARTS):
        programs = at + tl.arange(0, PARTS)
        slots = programs * 2 + (programs == from_program).to(tl.int32)
        there = programs <= to_program
        part = slots[:, None] * GROUP + rows[None, :]
        logs = tl.load(weight + part, mask=there[:, None] & live[None, :], other=float("-inf"), cache_modifier=".cg")
        parts = tl.load(
            partial + part[:, :, None] * DIM + dims[None, None, :],
            mask=there[:, None, None] & inside[None, :, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(logs, 0))
        shares = tl.exp2(logs - higher[None, :])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(shares, 0)
        sums = sums * fade[:, None] + tl.sum(parts * shares[:, :, None], 0)
        top = higher
    result = finished(top, total, sums, sinks, head * GROUP + rows, live, SINKS)
    tl.store(out + rows[:, None] * DIM + dims[None, :], result.to(out.dtype.element_ty), mask=inside)
