"""Capacity: what a rank can hold, and what is made of it. It does not know how memory is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from backend.config import EngineConfig
from backend.errors import LoadError


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a rank tells once after loading."""

    num_blocks: int
    """KV blocks that fit into its share of the free memory."""
    max_model_len: int
    """The model's own limit, tokens."""
    vocab_size: int


def share(config: EngineConfig, capacities: Sequence[Capacity]) -> tuple[int, int]:
    """KV blocks to allocate on every rank, and the longest sequence in tokens; LoadError if that is less than asked."""
    size, longest = config.block_size, capacities[0].max_model_len
    if config.max_model_len > longest:
        raise LoadError(f"max_model_len {config.max_model_len} is more than the model's {longest}")
    length = config.max_model_len or longest
    needed = -(-length // size)
    fitting = min(capacity.num_blocks for capacity in capacities)
    blocks = config.num_blocks or min(fitting, config.max_sequences * needed)  # more could never be used
    if blocks < 1:
        raise LoadError("no KV block fits into the free memory")
    if config.max_model_len and blocks < needed:
        raise LoadError(f"max_model_len {length} needs {needed} KV blocks of {size} tokens, {blocks} fit")
    return blocks, min(length, blocks * size)
