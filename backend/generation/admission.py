"""Admission: who may come, how long the queue is, and what the sequences at work may still need.

It knows no engine and no ranks.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Hashable, Iterable

from backend.config import EngineConfig
from backend.errors import Overloaded
from backend.generation.blocks import BlockPool
from backend.generation.sequence import Sequence
from backend.tally import Tally

REMEMBERED = 64
"""Sequences that ended last, about, of which the mean length is taken."""
MEMORY = 5.0
"""Seconds after which a rate measured before counts 1/e."""
MEASURED = 0.25
"""Seconds of a standing queue without which no rate is known."""


class Headroom:
    """Blocks to be left free at admission, so that those who run need not be preempted for one another."""

    def __init__(self, share: float, pool: BlockPool) -> None:
        self._share, self._pool = share, pool
        self._ended, self._mean = 0, 0.0

    def ended(self, seq: Sequence) -> None:
        """`seq` is complete; its length tells about the others'."""
        self._ended = min(self._ended + 1, REMEMBERED)
        self._mean += (len(seq.tokens) - seq.prompt_length - self._mean) / self._ended

    def blocks(self, needed: int) -> int:
        """To be left free while the running ones need so many more."""
        return math.ceil(self._share * needed)

    def need(self, sequences: Iterable[Sequence]) -> int:
        """Blocks that they are expected to take beyond those of the tokens they have."""
        return sum([self._need(seq) for seq in sequences]) if self._share else 0

    def _need(self, seq: Sequence) -> int:
        length, size = len(seq.tokens), self._pool.block_size
        done = length - seq.prompt_length
        left = seq.params.max_tokens - done
        if self._ended:  # who is past the mean goes on for a while
            left = min(left, max(size, round(self._mean) - done))
        return self._pool.blocks_for(length + left) - self._pool.blocks_for(length)


class Forecast:
    """How long the queue is: prompt tokens of requests that have no token yet, by the rate at which they begin.

    Any thread may ask. Admission calls `add`, `drop` and `began` under its lock, the engine's thread the others.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._queued: dict[Hashable, int] = {}
        self._tokens = 0
        self._began, self._busy = 0.0, 0.0
        self._looked, self._standing = now(), False

    @property
    def requests(self) -> int:
        """Those without a token yet."""
        return len(self._queued)

    @property
    def seconds(self) -> float:
        """Until one that came now would begin; 0 while no queue has stood for long enough to measure it."""
        if self._busy < MEASURED:
            return 0.0
        busy = self._busy + (self._now() - self._looked if self._standing else 0.0)
        return self._tokens * busy / max(self._began, 1.0)

    def __str__(self) -> str:
        waiting = f"{self.requests} requests wait for their first token"
        return f"{waiting}, one more would for about {seconds:.1f} s" if (seconds := self.seconds) else waiting

    def passes(self, limit: float) -> bool:
        """Whether one that came now would wait longer than so many seconds; 0: no limit."""
        return 0 < limit < self.seconds

    def add(self, request: Hashable, tokens: int) -> None:
        self._queued[request] = tokens
        self._tokens += tokens

    def drop(self, request: Hashable) -> None:
        """It is over, whether it began or not."""
        self._tokens -= self._queued.pop(request, 0)

    def began(self, request: Hashable, tokens: int) -> None:
        """A sequence of the request, with a prompt of so many tokens, has its first."""
        if self._standing:
            self._began += tokens
        if left := self._queued.get(request, 0):
            self._tokens -= min(tokens, left)
            if left > tokens:
                self._queued[request] = left - tokens
            else:
                del self._queued[request]

    def restart(self) -> None:
        """What was measured holds no more; the queue stays."""
        self._began, self._busy, self._looked, self._standing = 0.0, 0.0, self._now(), False

    def turn(self, waiting: int) -> None:
        """After each step: whether somebody had to wait. Only then does the rate tell what the model can do."""
        now = self._now()
        if self._standing:
            fade = math.exp((self._looked - now) / MEMORY)
            self._busy = self._busy * fade + MEMORY * (1 - fade)
            self._began *= fade
        self._looked, self._standing = now, waiting > 0


class Admission:
    """Requests let in and not yet out, within the configuration's limits. Any thread may use it."""

    def __init__(self, config: EngineConfig, tally: Tally) -> None:
        self.forecast = Forecast()
        self.sequences = 0
        """That are here, running or waiting."""
        self._most, self._longest = config.max_sequences + config.max_waiting, config.max_queue_seconds
        self._tally = tally
        self._lock = threading.Lock()

    def enter(self, request: Hashable, sequences: int, tokens: int) -> None:
        """Let in so many sequences, whose prompts have so many tokens together; Overloaded where they are too many."""
        with self._lock:
            if reason := self._refusal(sequences):
                self._tally.refused += 1
                raise Overloaded(f"{reason}; {self.forecast}; try again later")
            self.sequences += sequences
            self.forecast.add(request, tokens)

    def leave(self, request: Hashable, sequences: int) -> None:
        """The request is over, or its caller has gone."""
        with self._lock:
            self.sequences -= sequences
            self.forecast.drop(request)

    def began(self, request: Hashable, tokens: int) -> None:
        """A sequence of the request, with a prompt of so many tokens, has its first."""
        with self._lock:
            self.forecast.began(request, tokens)

    def _refusal(self, sequences: int) -> str:
        """Why so many more may not come; empty: they may."""
        here, most, longest = self.sequences, self._most, self._longest
        if here + sequences > most:
            return f"{here} sequences are running or waiting, the limit is {most} (max_sequences + max_waiting)"
        return f"the queue is longer than {longest:g} s (max_queue_seconds)" if self.forecast.passes(longest) else ""
