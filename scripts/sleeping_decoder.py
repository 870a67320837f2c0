"""A decoder without a model for scripts/bench_stub: a step takes a set time, as a GPU's would; any tokens come of it.

Steps wait for each other, and the next may be sent meanwhile. It is no worker that anything serves.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import numpy as np

from backend.generation.capacity import Capacity
from backend.generation.plan import Plan, Sampled
from backend.ranks.rank import Birth, Deferred

STEP = "BENCH_STEP_MS"
"""Environment variable: milliseconds of a decode step."""
PROMPT_TOKEN = 24e-6
"""Seconds more for each token of a prompt: an 8B model's on an H200."""
VOCABULARY = 49152
EXAMPLES = range(300, 20300)
"""Ids that stand for ordinary text in the sample's tokenizer."""


class SleepingDecoder:
    """Knows when the device that it plays will be free."""

    def __init__(self, birth: Birth, progress: Callable[[str], None]) -> None:
        self._step = float(os.environ[STEP]) / 1e3
        self._size = birth.config.block_size
        self._free_at = 0.0
        self._chance = np.random.default_rng(birth.rank)

    def capacity(self) -> Capacity:
        return Capacity(num_blocks=1 << 17, max_model_len=8192, vocab_size=VOCABULARY)

    def allocate(self, num_blocks: int, max_model_len: int) -> None:
        pass

    def warm_up(self) -> None:
        pass

    def step(self, plan: Plan) -> Deferred:
        seconds = self._step + PROMPT_TOKEN * (len(plan.input_ids) - len(plan.rows))
        due = self._free_at = max(time.monotonic(), self._free_at) + seconds
        token_ids = self._chance.choice(EXAMPLES, len(plan.rows)).astype(np.int32)
        logprobs = np.zeros(len(plan.rows), np.float32) if plan.sampling.logprobs else None

        def answer() -> Sampled:
            time.sleep(max(0.0, due - time.monotonic()))
            return Sampled(token_ids, logprobs)

        return answer
