"""Paged attention in plain torch: what serves on CPU, and what every kernel is checked against; no model knowledge.

Every sequence reads its own tokens only: positions past its end are read from its last token and masked, so whatever a
block's earlier owner left there (NaN included) cannot reach the result.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from backend.compute.attention.base import Rule
from backend.compute.attention.step import Step
from backend.compute.cache import rounded, write

GATHERED = 1 << 12
"""Tokens of context gathered at once for decode rows: enough to batch, few enough to stay in the processor's cache."""
SCORES = 1 << 24
"""Scores held at once where they have to be written out (soft cap, sinks)."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Rows of the step that are computed together, and the context that they read."""

    rows: Tensor | slice  # the tokens of the step: [S] chunks of one token, or one chunk
    context: Tensor | None  # int64 [S * L], token slots; None: those that this chunk writes are all there are
    mask: Tensor | None  # [S or 1, 1, rows or 1, L], added to the scores; None: nothing hidden, or causal
    causal: bool = False


def attend(query: Tensor, key: Tensor, value: Tensor, layer: int, step: Step, rule: Rule) -> Tensor:
    """[heads, tokens, dim] and twice [kv heads, tokens, dim] -> [tokens, heads, dim]."""
    key, value = rounded(key, step.cache.dtype), rounded(value, step.cache.dtype)
    write(step.cache.tokens(layer), step.kv_slots, key.transpose(0, 1), value.transpose(0, 1))
    return _read(query, (key, value), layer, step, rule)


def read(query: Tensor, layer: int, step: Step, rule: Rule, output: Tensor | None = None) -> Tensor:
    """[tokens, heads, dim], whose keys and values are in the cache already -> [tokens, heads, dim], there if given."""
    found = _read(query.transpose(0, 1), None, layer, step, rule)
    return found if output is None else output.copy_(found)


def _read(query: Tensor, new: tuple[Tensor, Tensor] | None, layer: int, step: Step, rule: Rule) -> Tensor:
    """`new`: the step's own keys and values, where they need not be gathered from the cache."""
    output = query.new_empty(query.shape[1], query.shape[0], query.shape[2])
    for part in step.once(("decode", rule.window, query.dtype), lambda: list(_decodes(step, rule.window, query.dtype))):
        output[part.rows] = _decode(part, query[:, part.rows], layer, step, rule)
    for part in step.once(("chunks", rule.window, query.dtype), lambda: list(_chunks(step, rule.window, query.dtype))):
        output[part.rows] = _chunk(part, query[:, part.rows], new, layer, step, rule)
    return output


def _decode(part: Part, query: Tensor, layer: int, step: Step, rule: Rule) -> Tensor:
    """[heads, S, dim] -> [S, heads, dim]; the heads that share a kv head are rows of one product."""
    heads, count, dim = query.shape
    assert part.context is not None
    keys, values = _gathered(layer, part.context, count, step, query)  # [S, kv heads, L, dim]
    grouped = query.transpose(0, 1).reshape(count, keys.shape[1], -1, dim)
    sinks = rule.sinks if rule.sinks is None else rule.sinks.view(1, keys.shape[1], -1, 1)
    return _weigh(grouped, keys, values, part, rule, sinks).reshape(count, heads, dim)


def _chunk(part: Part, query: Tensor, new: tuple[Tensor, Tensor] | None, layer: int, step: Step, rule: Rule) -> Tensor:
    """[heads, rows, dim] -> [rows, heads, dim]; kv heads are the batch, each expanded over its group without a copy."""
    heads, count, dim = query.shape
    if part.context is None and new is not None:
        keys, values = (each[:, part.rows].to(query.dtype) for each in new)
    else:
        context = step.kv_slots[part.rows] if part.context is None else part.context
        keys, values = (gathered[0] for gathered in _gathered(layer, context, 1, step, query))
    group = heads // keys.shape[0]
    grouped = query.reshape(keys.shape[0], group, count, dim)
    sinks = rule.sinks if rule.sinks is None else rule.sinks.view(-1, group, 1, 1)
    keys, values = (x[:, None].expand(-1, group, -1, -1) for x in (keys, values))
    return _weigh(grouped, keys, values, part, rule, sinks).reshape(heads, count, dim).transpose(0, 1)


def _gathered(layer: int, context: Tensor, sequences: int, step: Step, query: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the context in the queries' dtype, each [sequences, kv heads, L, dim]."""
    keys, values = step.cache.gather(layer, context, sequences)
    return keys.to(query.dtype), values.to(query.dtype)


def _weigh(query: Tensor, key: Tensor, value: Tensor, part: Part, rule: Rule, sinks: Tensor | None) -> Tensor:
    """[B, H, M, dim] over [B, H, L, dim]; softmax in float32."""
    if not rule.softcap and sinks is None:
        return scaled_dot_product_attention(
            query, key, value, attn_mask=part.mask, is_causal=part.causal, scale=rule.scaling
        )
    mask = part.mask
    if part.causal:
        mask = _mask(0, 0, query.shape[2], 0, query.dtype, query.device)
    rows = max(1, SCORES // (query.shape[0] * query.shape[1] * key.shape[2]))
    pieces = [slice(at, at + rows) for at in range(0, query.shape[2], rows)]
    return torch.cat(
        [_explicit(query[:, :, piece], key, value, _rows(mask, piece), rule, sinks) for piece in pieces], 2
    )


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: Rule, sinks: Tensor | None
) -> Tensor:
    scores = torch.matmul(query, key.transpose(2, 3)).float() * rule.scaling
    if rule.softcap:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    if mask is not None:
        scores = scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().expand(*scores.shape[:3], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : key.shape[2]]
    return torch.matmul(weights.to(value.dtype), value)


def _rows(mask: Tensor | None, piece: slice) -> Tensor | None:
    return mask if mask is None or mask.shape[2] == 1 else mask[:, :, piece]


def _decodes(step: Step, window: int, dtype: torch.dtype) -> Iterator[Part]:
    """The chunks of one token, those of similar length together: padding at most doubles what is read."""
    single = (step.host_starts[1:] - step.host_starts[:-1]) == 1
    similar: dict[int, list[int]] = defaultdict(list)
    for chunk in single.nonzero()[0].tolist():
        length = int(step.host_lengths[chunk])
        similar[(min(length, window) if window else length).bit_length()].append(chunk)
    for chunks in similar.values():
        longest = int(step.host_lengths[chunks].max())
        count = max(1, GATHERED // max(1, min(longest, window) if window else longest))
        for at in range(0, len(chunks), count):
            yield _decode_part(step, chunks[at : at + count], window, dtype)


def _decode_part(step: Step, chunks: list[int], window: int, dtype: torch.dtype) -> Part:
    device = step.kv_slots.device
    lengths = torch.tensor(step.host_lengths[chunks], device=device).clamp(min=1)[:, None]  # [S, 1]
    first = (lengths - window).clamp(min=0) if window else torch.zeros_like(lengths)
    seen = lengths - first
    offsets = torch.arange(int(seen.max()), device=device)[None]  # [1, L]
    picked = torch.tensor(chunks, device=device)
    context = step.cache.slots(step.block_tables[picked], torch.minimum(first + offsets, lengths - 1))
    hidden = offsets >= seen
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)[:, None, None]
    rows = [int(step.host_starts[chunk]) for chunk in chunks]
    straight = rows == list(range(rows[0], rows[0] + len(rows)))
    where = slice(rows[0], rows[0] + len(rows)) if straight else torch.tensor(rows, device=device)
    return Part(where, context.flatten(), mask if bool(hidden.any()) else None)


def _chunks(step: Step, window: int, dtype: torch.dtype) -> Iterator[Part]:
    """The chunks of more than one token, each by itself."""
    for chunk, end in enumerate(step.host_starts[1:].tolist()):
        start, length = int(step.host_starts[chunk]), int(step.host_lengths[chunk])
        if end - start > 1:
            yield _chunk_part(step, chunk, slice(start, end), length, window, dtype)


def _chunk_part(step: Step, chunk: int, rows: slice, length: int, window: int, dtype: torch.dtype) -> Part:
    device, count = step.kv_slots.device, rows.stop - rows.start
    position = length - count
    windowed = bool(window) and length > window
    if position == 0:
        mask = _mask(0, 0, length, window, dtype, device) if windowed else None
        return Part(rows, None, mask, causal=not windowed)
    first = max(0, position - window + 1) if window else 0
    context = step.cache.slots(step.block_tables[chunk][None], torch.arange(first, length, device=device)[None])
    return Part(rows, context.flatten(), _mask(position, first, length, window, dtype, device))


def _mask(position: int, first: int, end: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[1, 1, end - position, end - first]: which of the positions from `first` a query from `position` on sees."""
    rows = torch.arange(position, end, device=device)[:, None]
    columns = torch.arange(first, end, device=device)[None]
    hidden = columns > rows
    if window:
        hidden |= columns <= rows - window
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)[None, None]
