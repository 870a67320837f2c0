"""Plan: one step as numpy arrays, what the scheduler's chunks mean to the ranks. It does not know how they compute."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from itertools import chain
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from backend.generation.sequence import SamplingParams

if TYPE_CHECKING:  # the ranks read plans and need no scheduler
    from backend.generation.scheduler import Chunk

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Floats = NDArray[np.float32]

LAST_TOKEN = -1
"""In Plan.input_ids: the token that the same slot sampled in the step before, which only the ranks know yet."""


@dataclass(frozen=True, slots=True, eq=False)
class Sampling:
    """How each of the R sampling rows chooses its token."""

    temperature: Floats  # [R], 0 is greedy
    top_p: Floats  # [R], 1 is off
    top_k: Ints  # [R], 0 is off
    min_p: Floats  # [R], 0 is off
    repetition_penalty: Floats  # [R], 1 is off; over prompt and completion
    frequency_penalty: Floats  # [R], 0 is off; over the completion
    presence_penalty: Floats  # [R], 0 is off; over the completion
    seeds: Longs  # [R]
    counters: Longs  # [R], index of the token in its completion: with the seed, the random number's whole state
    blocked: Longs  # [K, 2], (row, token id) pairs that must not be chosen: ends before min_tokens
    logprobs: bool  # whether any row asks for the log-probability of its token

    def __reduce__(self) -> tuple[Any, ...]:
        return Sampling, _sampling_fields(self)  # dataclasses would look their fields up anew for each step

    @property
    def greedy(self) -> bool:
        """Whether every row takes the most likely token."""
        return not self.temperature.any()

    @property
    def plain(self) -> bool:
        """Whether a token of each row is all that is asked for, chosen or drawn from the logits as they are."""
        return not self.logprobs and not len(self.blocked) and not self.penalised

    @property
    def penalised(self) -> bool:
        """Whether any row needs the counts of its earlier tokens."""
        return bool((self.repetition_penalty != 1).any() or self.frequency_penalty.any() or self.presence_penalty.any())

    def without(self, row: int) -> Sampling:
        """The same less one row."""
        pairs = self.blocked[self.blocked[:, 0] != row]
        pairs[:, 0] -= pairs[:, 0] > row
        columns: dict[str, Any] = {each.name: np.delete(getattr(self, each.name), row) for each in fields(self)[:-2]}
        return replace(self, blocked=pairs, **columns)


@dataclass(frozen=True, slots=True, eq=False)
class History:
    """The known tokens of a penalised sequence that has just been given `slot`: its counts start from them."""

    slot: int
    prompt: Ints
    completion: Ints


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """One step: S chunks of T tokens in all, R of which sample a next token."""

    input_ids: Ints  # [T], LAST_TOKEN where the rank knows better
    positions: Ints  # [T]
    kv_slots: Longs  # [T], block number x block size + offset: where the token's key and value go
    query_starts: Ints  # [S + 1], borders of the chunks in the token dimension
    kv_lengths: Ints  # [S], tokens in the cache once the chunk is computed
    block_tables: Ints  # [S, max blocks of a chunk], block numbers, 0 past the end
    slots: Ints  # [S], rows of the per-sequence state
    rows: Longs  # [R], chunks that sample, ascending
    sampling: Sampling
    histories: tuple[History, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan, _plan_fields(self)

    @property
    def decode(self) -> bool:
        """Whether every chunk is one token and samples: the shape that CUDA graphs are captured for."""
        return len(self.input_ids) == len(self.rows)

    def without(self, chunk: int) -> Plan:
        """The same step less one chunk."""
        lengths = np.diff(self.query_starts)
        tokens = slice(self.query_starts[chunk], self.query_starts[chunk + 1])
        row, others = np.flatnonzero(self.rows == chunk), self.rows[self.rows != chunk]
        return Plan(
            input_ids=np.delete(self.input_ids, tokens),
            positions=np.delete(self.positions, tokens),
            kv_slots=np.delete(self.kv_slots, tokens),
            query_starts=np.concatenate([[0], np.cumsum(np.delete(lengths, chunk))]).astype(np.int32),
            kv_lengths=np.delete(self.kv_lengths, chunk),
            block_tables=np.delete(self.block_tables, chunk, axis=0),
            slots=np.delete(self.slots, chunk),
            rows=others - (others > chunk),
            sampling=self.sampling.without(int(row[0])) if row.size else self.sampling,
            histories=tuple(history for history in self.histories if history.slot != self.slots[chunk]),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """What the ranks answer."""

    token_ids: Ints  # [R]
    logprobs: Floats | None  # [R], natural logarithm, before temperature and penalties; only if asked for
    lost: tuple[int, ...] = ()
    """Chunks that were not computed, for want of device memory: their keys, values and tokens are not there."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Sampled, (self.token_ids, self.logprobs, self.lost)


_plan_fields = attrgetter(*(field.name for field in fields(Plan)))
_sampling_fields = attrgetter(*(field.name for field in fields(Sampling)))


def pack(chunks: list[Chunk], block_size: int) -> Plan:
    """Lay one step out as arrays.

    To be called before anything else happens to the scheduler: slots and tokens are read from the sequences.
    """
    starts, lengths = _ints([chunk.start for chunk in chunks]), _ints([chunk.length for chunk in chunks])
    kv_lengths = starts + lengths
    query_starts = np.zeros(len(chunks) + 1, np.int32)
    np.cumsum(lengths, dtype=np.int32, out=query_starts[1:])
    chunk_of = np.arange(len(chunks)).repeat(lengths)  # [T]
    positions = np.arange(query_starts[-1], dtype=np.int32) + (starts - query_starts[:-1])[chunk_of]
    tables = _block_tables(chunks, -(-kv_lengths // block_size))
    blocks = tables[chunk_of, positions // block_size].astype(np.int64)  # [T]
    sampling = [chunk for chunk in chunks if chunk.samples]
    return Plan(
        input_ids=_joined(chunk.seq.tokens[chunk.start : chunk.start + chunk.length] or _UNKNOWN for chunk in chunks),
        positions=positions,
        kv_slots=blocks * block_size + positions % block_size,
        query_starts=query_starts,
        kv_lengths=kv_lengths,
        block_tables=tables,
        slots=_ints([chunk.seq.slot for chunk in chunks]),
        rows=np.flatnonzero(np.array([chunk.samples for chunk in chunks], bool)),
        sampling=_sampling(sampling),
        histories=tuple(_history(chunk) for chunk in chunks if chunk.first and chunk.seq.params.penalised),
    )


_UNKNOWN = array("i", [LAST_TOKEN])  # a token in flight is always a chunk of its own

_floats_of = attrgetter("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")


_last: tuple[list[SamplingParams], Sampling] | None = None


def _sampling(chunks: list[Chunk]) -> Sampling:
    """Mostly the same sequences sample as in the step before, one token later."""
    global _last
    params = [chunk.seq.params for chunk in chunks]
    if (known := _last) is None or not _same(known[0], params):
        _last = known = params, _columns(params)
    counters = [chunk.start + chunk.length - chunk.seq.prompt_length for chunk in chunks]
    return replace(known[1], counters=np.array(counters, np.int64), blocked=_blocked(params, counters))


def _same(before: list[SamplingParams], now: list[SamplingParams]) -> bool:
    """Whether these are the same objects, in the same order."""
    return len(before) == len(now) and all(map(is_, before, now))


def _columns(params: list[SamplingParams]) -> Sampling:
    """What does not change from token to token."""
    flat = np.fromiter(chain.from_iterable(map(_floats_of, params)), np.float32, 6 * len(params))
    temperature, top_p, min_p, repetition, frequency, presence = np.ascontiguousarray(flat.reshape(-1, 6).T)
    return Sampling(
        temperature=temperature,
        top_p=top_p,
        top_k=_ints([p.top_k for p in params]),
        min_p=min_p,
        repetition_penalty=repetition,
        frequency_penalty=frequency,
        presence_penalty=presence,
        seeds=np.array([p.seed for p in params], np.uint64).view(np.int64),
        counters=_NONE,
        blocked=_NONE,
        logprobs=any(p.logprobs for p in params),
    )


_NONE = np.zeros(0, np.int64)


def _blocked(params: list[SamplingParams], counters: list[int]) -> Longs:
    early = [(row, p) for row, p in enumerate(params) if counters[row] < p.min_tokens]
    pairs = [(row, token_id) for row, p in early for token_id in sorted(p.stop_token_ids)]
    return np.array(pairs, np.int64).reshape(-1, 2)


def _block_tables(chunks: list[Chunk], counts: Ints) -> Ints:
    """Lay out each chunk's first `counts` blocks, 0 past the end."""
    tables = np.zeros((len(chunks), counts.max(initial=0)), np.int32)
    pairs = zip([chunk.blocks for chunk in chunks], counts.tolist(), strict=True)
    blocks = _joined([held if len(held) == count else held[:count] for held, count in pairs])
    tables[np.arange(tables.shape[1]) < counts[:, None]] = blocks
    return tables


def _history(chunk: Chunk) -> History:
    """Copy all tokens: none is in flight when a sequence is given a slot."""
    tokens, border = chunk.seq.tokens, chunk.seq.prompt_length
    return History(chunk.seq.slot, prompt=_joined([tokens[:border]]), completion=_joined([tokens[border:]]))


def _ints(values: list[int]) -> Ints:
    return np.array(values, np.int32)


def _joined(parts: Iterable[array[int]]) -> Ints:
    """Copy int32 buffers, laid end to end, into a writable array."""
    return np.frombuffer(bytearray().join(parts), np.int32)
