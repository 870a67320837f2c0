"""Account: what an engine's steps and completions add to its tally. It does not know who reads that.

All of it runs on the engine's thread: additions once a step, and clocks and lists once a sequence.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from backend.generation.completion import Completion
from backend.generation.scheduler import Chunk, Scheduler
from backend.metrics import GENERATE
from backend.tally import Tally


class Account:
    """One engine's, over all restarts of its ranks."""

    def __init__(self) -> None:
        self.tally = Tally(GENERATE)
        self._before = (0, 0, 0)

    def opened(self) -> None:
        """A new scheduler counts from 0; what the earlier ones counted stays."""
        self._before = self.tally.preemptions, self.tally.prefix_queries, self.tally.prefix_hits

    def turn(self, scheduler: Scheduler) -> None:
        """After a turn of the engine."""
        tally, pool = self.tally, scheduler.pool
        tally.turn()
        preemptions, queries, hits = self._before
        tally.running, tally.waiting, tally.kv_usage = scheduler.num_running, scheduler.num_waiting, pool.usage
        tally.preemptions = preemptions + scheduler.preemptions
        tally.prefix_queries, tally.prefix_hits = queries + pool.prefix_queries, hits + pool.prefix_hits

    def sent(self, chunks: list[Chunk], tokens: int, completions: Mapping[int, Completion]) -> None:
        """A step of so many tokens is on its way."""
        self.tally.step(tokens, tokens)
        for chunk in reversed(chunks):  # those that have just been given their slot are the last
            if not chunk.first:
                break
            if (completion := completions.get(chunk.seq.arrival)) and not completion.begun:
                completion.begun = time.monotonic()
                completion.stream.begun = completion.stream.begun or completion.begun
                self.tally.queue.append(completion.begun - completion.stream.arrived)

    def first(self, completion: Completion) -> None:
        """Its first token is there."""
        completion.first = time.monotonic()
        completion.stream.first = completion.stream.first or completion.first
        self.tally.prompt_tokens += completion.seq.prompt_length
        self.tally.first_token.append(completion.first - completion.stream.arrived)

    def last(self, completion: Completion) -> None:
        """It has its last token."""
        seq, now = completion.seq, time.monotonic()
        completion.stream.last = now
        self.tally.ended(seq.finish_reason, now - completion.stream.arrived)
        if (later := len(seq.tokens) - seq.prompt_length - 1) > 0:
            self.tally.token.append((now - completion.first) / later)
