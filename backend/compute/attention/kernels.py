"""Paged attention as OpenAI-Triton kernels, for CUDA; they know strides and block tables, not models.

One kernel serves prefill, mixed and decode steps: a tile is some tokens of one chunk times the heads of one kv head,
with an online softmax over the context (Dao et al. 2022; paging as in Kwon et al. 2023). In a decode step a tile is one
token, and the context is split over programs whose partial results a second kernel joins (split-KV). Nothing here
reads a device value on the host, and a decode step's launches depend on shapes alone: CUDA graphs may hold them.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from backend.compute.attention.base import Rule
from backend.compute.attention.step import Step
from backend.errors import LoadError

LOG2E = tl.constexpr(1.4426950408889634)
WIDEST_HEAD = 256
SPLIT_TOKENS = 256
"""Context that is worth a program of its own in a decode step."""
PROGRAMS_PER_PROCESSOR = 2


def attend(query: Tensor, key: Tensor, value: Tensor, layer: int, step: Step, rule: Rule) -> Tensor:
    """[heads, tokens, dim] and twice [kv heads, tokens, dim] -> [tokens, heads, dim]."""
    _write(step.cache.layers[layer], key, value, step.kv_slots)
    return read(query.transpose(0, 1), layer, step, rule)


def _write(kv: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> None:
    heads, tokens, dim = key.shape
    key, value = _dense(key), _dense(value)
    _write_kernel[(tokens,)](
        kv, key, value, slots, key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        HEADS=heads, DIM=dim, BLOCK=triton.next_power_of_2(heads * dim),
    )  # fmt: skip


def read(query: Tensor, layer: int, step: Step, rule: Rule) -> Tensor:
    """[tokens, heads, dim], whose keys and values are in the cache already -> [tokens, heads, dim]."""
    kv = step.cache.layers[layer]
    tokens, heads, dim = query.shape
    if dim > WIDEST_HEAD or dim % 8:
        raise LoadError(f"head size {dim}: the CUDA kernel takes multiples of 8 up to {WIDEST_HEAD}")
    kv_heads = kv.shape[3]
    group = heads // kv_heads
    query = _dense(query)
    output = torch.empty(tokens, heads, dim, dtype=query.dtype, device=query.device)
    rows, columns, warps = _tile_shape(query, group, step.decode)
    if step.decode:
        tokens_per_tile, splits, tiles = 1, _splits(step, kv_heads, rule.window), step.kv_lengths
    else:
        tokens_per_tile, splits = rows // group, 1
        tiles = step.once(("tiles", tokens_per_tile), lambda: _tiles(step, tokens_per_tile))
    partial, weight = _partials(output, splits)
    _attend_kernel[(len(tiles), kv_heads, splits)](
        partial, weight, query, kv, rule.sinks, tiles, step.query_starts, step.kv_lengths, step.block_tables,
        rule.scaling, rule.softcap, query.stride(1), query.stride(0), kv.stride(0), kv.stride(1), kv.stride(2),
        step.block_tables.stride(0), rule.window,
        GROUP=group, DIM=dim, PADDED=_padded(dim), BLOCK_SIZE=kv.shape[1], ROWS=rows, COLUMNS=columns,
        TOKENS=tokens_per_tile, DECODE=step.decode, SPLITS=splits, WINDOWED=bool(rule.window),
        CAPPED=bool(rule.softcap), SINKS=rule.sinks is not None,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32", num_warps=warps, num_stages=2,
    )  # fmt: skip
    if splits > 1:
        _join_kernel[(tokens, heads)](
            output, partial, weight, rule.sinks, DIM=dim, PADDED=_padded(dim), SPLITS=splits,
            SINKS=rule.sinks is not None,
        )  # fmt: skip
    return output


def _dense(tensor: Tensor) -> Tensor:
    """The same values with the head's dimension contiguous, as transformers nearly always has it."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def _padded(dim: int) -> int:
    """Powers of two from 16 on, which is what tl.dot takes."""
    return max(16, int(triton.next_power_of_2(dim)))


def _tile_shape(query: Tensor, group: int, decode: bool) -> tuple[int, int, int]:
    """Rows (tokens x grouped heads), columns (context tokens) and warps of a program."""
    wide = query.shape[2] > 128 or query.dtype == torch.float32
    least = max(16, triton.next_power_of_2(group))
    if decode:
        return least, 32 if wide else 64, 4
    return max(least, 32 if wide else 64), 32 if wide else 64, 4


def _tiles(step: Step, tokens: int) -> Tensor:
    """int32 [tiles, 2]: (chunk, its first token in the tile), cutting every chunk into tiles of this many tokens."""
    counts = np.diff(step.host_starts)
    per_chunk = -(-counts // tokens)
    chunks = np.repeat(np.arange(len(counts), dtype=np.int32), per_chunk)
    firsts = (np.arange(len(chunks)) - np.repeat(np.cumsum(per_chunk) - per_chunk, per_chunk)) * tokens
    return torch.from_numpy(np.stack([chunks, firsts.astype(np.int32)], 1)).to(step.kv_slots.device, non_blocking=True)


def _splits(step: Step, kv_heads: int, window: int) -> int:
    """Programs that share one row's context: enough to fill the device, each worth its while; from shapes alone."""
    longest = step.block_tables.shape[1] * step.cache.block_size
    longest = min(longest, window) if window else longest
    wanted = -(-_processors(step.cache.device) * PROGRAMS_PER_PROCESSOR // (len(step.kv_lengths) * kv_heads))
    most = max(1, min(wanted, -(-longest // SPLIT_TOKENS), 64))
    return 1 << (most.bit_length() - 1)  # few values: each is a kernel to compile


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _partials(output: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Where programs put their results, float32 [tokens, heads, splits, dim], and log2 of their weights."""
    if splits == 1:
        return output, output
    tokens, heads, dim = output.shape
    partial = torch.empty(tokens, heads, splits, dim, dtype=torch.float32, device=output.device)
    return partial, torch.empty(tokens, heads, splits, dtype=torch.float32, device=output.device)


def _jit(function: Callable[..., None]) -> Any:
    """Compiled anew for other types and alignments, not for other values of what differs from step to step."""
    return triton.jit(function, do_not_specialize=["table_row", "window"])


@_jit
def _write_kernel(
    kv, key, value, slots, key_head, key_token, value_head, value_token,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program copies one token's keys and values to its slot."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < HEADS * DIM
    head, dim = offsets // DIM, offsets % DIM
    base = kv + slot * (2 * HEADS * DIM) + offsets
    tl.store(base, tl.load(key + token * key_token + head * key_head + dim, mask=inside), mask=inside)
    tl.store(
        base + HEADS * DIM, tl.load(value + token * value_token + head * value_head + dim, mask=inside), mask=inside
    )


@_jit
def _attend_kernel(
    output, weight, query, kv, sinks, tiles, query_starts, kv_lengths, block_tables,
    scaling, softcap, query_head, query_token, kv_block, kv_slot, kv_value, table_row, window,
    GROUP: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, TOKENS: tl.constexpr, DECODE: tl.constexpr, SPLITS: tl.constexpr, WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr, SINKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Row r of a tile is its token r // GROUP and head r % GROUP of this kv head."""
    kv_head = tl.program_id(1)
    if DECODE:
        chunk = tl.program_id(0)
        first = 0
    else:
        chunk = tl.load(tiles + tl.program_id(0) * 2)
        first = tl.load(tiles + tl.program_id(0) * 2 + 1)
    start = tl.load(query_starts + chunk)
    count = tl.load(query_starts + chunk + 1) - start
    length = tl.load(kv_lengths + chunk)

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, PADDED)
    in_chunk = first + rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    live = (rows < TOKENS * GROUP) & (in_chunk < count)
    token = (start + in_chunk).to(tl.int64)
    position = length - count + in_chunk
    q = tl.load(
        query + token[:, None] * query_token + head[:, None] * query_head + dims[None, :],
        mask=live[:, None] & (dims < DIM)[None, :], other=0.0,
    )  # fmt: skip

    # The context that any row of the tile sees, and this program's share of it.
    begin = 0
    if WINDOWED:
        begin = tl.maximum(length - count + first - window + 1, 0) // COLUMNS * COLUMNS
    end = tl.minimum(length, length - count + first + TOKENS)
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(end - begin, COLUMNS), SPLITS) * COLUMNS
        begin += tl.program_id(2) * share
        end = tl.minimum(end, begin + share)

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if SINKS and SPLITS == 1:
        top = tl.load(sinks + head, mask=live, other=0.0).to(tl.float32) * LOG2E
        total += 1.0
    sums = tl.zeros([ROWS, PADDED], tl.float32)
    table = block_tables + chunk.to(tl.int64) * table_row
    base = kv + kv_head * DIM
    for at in range(begin, end, COLUMNS):
        columns = at + tl.arange(0, COLUMNS)
        known = columns < length
        block = tl.load(table + columns // BLOCK_SIZE, mask=known, other=0).to(tl.int64)
        where = base + block * kv_block + (columns % BLOCK_SIZE) * kv_slot
        mask = known[:, None] & (dims < DIM)[None, :]
        k = tl.load(where[:, None] + dims[None, :], mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
        if CAPPED:
            scores = softcap * (2.0 / (1.0 + tl.exp2(scores * (-2.0 * LOG2E / softcap))) - 1.0)
        seen = (columns[None, :] <= position[:, None]) & live[:, None]
        if WINDOWED:
            seen = seen & (columns[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores * LOG2E, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
        weights = tl.exp2(scores - safe[:, None])
        fade = tl.exp2(top - safe)
        total = total * fade + tl.sum(weights, 1)
        v = tl.load(where[:, None] + kv_value + dims[None, :], mask=mask, other=0.0)
        sums = tl.dot(weights.to(v.dtype), v, sums * fade[:, None], input_precision=PRECISION)
        top = higher

    result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    HEADS = tl.num_programs(1) * GROUP
    row = (token * HEADS + head) * SPLITS + tl.program_id(2)
    inside = live[:, None] & (dims < DIM)[None, :]
    tl.store(output + row[:, None] * DIM + dims[None, :], result.to(output.dtype.element_ty), mask=inside)
    if SPLITS > 1:
        tl.store(
            weight + row,
            tl.where(total == 0.0, float("-inf"), top + tl.log2(tl.where(total == 0.0, 1.0, total))),
            mask=live,
        )


@_jit
def _join_kernel(
    output, partial, weight, sinks,
    DIM: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """One program joins one token's and head's partial results, each weighted by the sum behind it."""
    row = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    splits = tl.arange(0, SPLITS)
    dims = tl.arange(0, PADDED)
    logs = tl.load(weight + row * SPLITS + splits)
    top = tl.max(logs, 0)
    if SINKS:
        sink = tl.load(sinks + tl.program_id(1)).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    top = tl.where(top == float("-inf"), 0.0, top)
    shares = tl.exp2(logs - top)
    total = tl.sum(shares, 0)
    if SINKS:
        total += tl.exp2(sink - top)
    parts = tl.load(
        partial + (row * SPLITS + splits[:, None]) * DIM + dims[None, :],
        mask=(dims < DIM)[None, :], other=0.0,
    )  # fmt: skip
    result = tl.sum(parts * shares[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(output + row * DIM + dims, result.to(output.dtype.element_ty), mask=dims < DIM)
