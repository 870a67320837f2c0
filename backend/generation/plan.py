"""Plan: one step as numpy arrays, what the scheduler's chunks mean to the ranks. It does not know how they compute it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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

    @property
    def greedy(self) -> bool:
        """Whether every row takes the most likely token."""
        return not self.temperature.any()

    @property
    def penalised(self) -> bool:
        """Whether any row needs the counts of its earlier tokens."""
        return bool(
            (self.repetition_penalty != 1).any() or self.frequency_penalty.any() or self.presence_penalty.any()
        )


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

    @property
    def decode(self) -> bool:
        """Whether every chunk is one token and samples: the shape that CUDA graphs are captured for."""
        return len(self.input_ids) == len(self.rows)


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """What the ranks answer."""

    token_ids: Ints  # [R]
    logprobs: Floats | None  # [R], natural logarithm, before temperature and penalties; only if asked for


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a rank can hold, told once after loading."""

    num_blocks: int
    """KV blocks that fit into its share of the free memory."""
    max_model_len: int
    """The model's own limit, tokens."""
    vocab_size: int
