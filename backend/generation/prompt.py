"""Prompt: what one caller wants completed, and the sequences that it becomes. It does not know who runs them."""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, replace
from math import inf

from backend.errors import InvalidInput
from backend.generation.sequence import SamplingParams, Sequence

SEED_STEP = 0x9E3779B97F4A7C15
"""Odd, so that the samples of one prompt have different seeds (Weyl sequence)."""


@dataclass(frozen=True)
class Prompt:
    """One prompt and what is wanted of it."""

    token_ids: array[int]
    params: SamplingParams
    n: int = 1
    priority: int = 0
    """Lower goes first."""
    timeout: float = inf
    """Seconds from submission."""
    salt: bytes = b""

    def check(self, max_model_len: int, vocab_size: int) -> None:
        """InvalidInput unless the model could compute it and one token more."""
        length, limit = len(self.token_ids), max_model_len - 1
        if not 1 <= length <= limit:
            raise InvalidInput(f"the prompt has {length} tokens, the limit is {limit} (max_model_len - 1)")
        for token in (min(self.token_ids), max(self.token_ids)):
            if not 0 <= token < vocab_size:
                raise InvalidInput(f"token id {token} is not in the vocabulary of {vocab_size}")

    def sequences(self, max_model_len: int, salt: bytes) -> list[Sequence]:
        """One for each sample, with a seed of its own; none grows past the model's length."""
        deadline = time.monotonic() + self.timeout
        most = min(self.params.max_tokens, max_model_len - len(self.token_ids))
        seeds = [(self.params.seed + sample * SEED_STEP) % 2**64 for sample in range(self.n)]
        params = [replace(self.params, max_tokens=most, seed=seed) for seed in seeds]
        return [Sequence(self.token_ids[:], each, self.priority, deadline, salt) for each in params]
