"""Tally: one model's numbers, as its engine or service counts them, and what has changed since somebody looked.

Each plain number has one writer, and a token costs an addition; one other thread reads now and then, and may see a step
half counted. Only `ended` is for any thread. It knows no Triton, nor who reads.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from backend.errors import Cancelled, DeadlineExceeded
from backend.metrics import COUNTER, HISTOGRAM, REASONS, Metric

ANSWERED = ("stop", "length")
ENDED, READY, STARTING, FAILED = range(4)
"""States of a model: unloaded; serving; loading, at first or again; failed for good."""
KEPT = 1000
"""Values of a histogram that wait for the reader; each costs it 20 µs, so of more in a second it gets the last ones."""


class Change(NamedTuple):
    """What a counter has gained, a gauge is now, or a histogram is to observe."""

    metric: Metric
    reason: str
    value: float


Values = deque[float]


def _values() -> Values:
    return deque(maxlen=KEPT)


@dataclass
class Tally:
    """Written by the thread that serves (`refused` by Admission, under its lock), `changes` is called by one other."""

    metrics: tuple[Metric, ...]
    patience: float = inf
    """Seconds that a turn of the thread that serves may take: past them there is no heartbeat, though others live."""
    state: int = STARTING
    turned: float = 0.0
    """When that thread last went on (time.monotonic)."""
    last_step: float = 0.0
    """Unix time at which the last step was done."""
    ranks_up: int = 0
    restarts: int = 0
    load_seconds: float = 0.0
    proof_difference: float = 0.0
    steps: int = 0
    """Steps or micro-batches sent."""
    tokens: int = 0
    """Of those steps."""
    computed: int = 0
    """Tokens of those steps, their padding with them."""
    running: int = 0
    waiting: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    kv_usage: float = 0.0
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    first_token: Values = field(default_factory=_values)
    token: Values = field(default_factory=_values)
    queue: Values = field(default_factory=_values)
    latency: Values = field(default_factory=_values)
    _seen: dict[tuple[str, str], int] = field(default_factory=dict)
    _looked: tuple[int, int, int] = (0, 0, 0)
    _beat: float = 0.0
    _ending: threading.Lock = field(default_factory=threading.Lock)
    """A task's requests are ended by its thread, its watch and its callers."""

    def up(self, ranks: int, seconds: float) -> None:
        """So many ranks serve from now on; loading them took `seconds`."""
        self.ranks_up, self.load_seconds = ranks, seconds
        self.state, self.turned = READY, time.monotonic()

    def down(self, state: int) -> None:
        """Nothing is served any more, or for now."""
        self.state = state
        self.ranks_up = self.running = self.waiting = 0
        self.kv_usage = 0.0

    def turn(self) -> None:
        """The thread that serves goes on."""
        self.turned = time.monotonic()

    def done(self) -> None:
        """A step is."""
        self.last_step = time.time()

    def step(self, tokens: int, computed: int) -> None:
        """A step was sent: its tokens, without padding and with it."""
        self.steps += 1
        self.tokens += tokens
        self.computed += computed

    def ended(self, reason: str, seconds: float = 0.0) -> None:
        """Any thread: one sequence or request is over; its time counts where it was answered."""
        with self._ending:
            self.finished[reason] += 1
        if reason in ANSWERED:
            self.latency.append(seconds)

    def changes(self, last: bool = False) -> Iterator[Change]:
        """What counters have gained since the last call, where gauges are, what histograms have not seen yet.

        `last`: nobody will call again.
        """
        means = self._means()
        means["heartbeat"] = 0.0 if last else self._heartbeat()
        for metric in self.metrics:
            if metric.kind == HISTOGRAM:
                yield from self._observed(metric)
            elif metric.kind == COUNTER:
                yield from self._gained(metric)
            else:  # also what stays: the model's predecessor may write there too
                yield Change(metric, "", means[metric.number] if metric.number in means else vars(self)[metric.number])

    def _heartbeat(self) -> float:
        """Unix time; it stands still while the thread that serves does."""
        if self.state != READY or time.monotonic() - self.turned <= self.patience:
            self._beat = time.time()
        return self._beat

    def _gained(self, metric: Metric) -> Iterator[Change]:
        for reason in metric.reasons:
            now = self.finished[reason] if reason else vars(self)[metric.number]
            before = self._seen.get((metric.name, reason), 0)
            if now > before:
                self._seen[metric.name, reason] = now
                yield Change(metric, reason, now - before)

    def _observed(self, metric: Metric) -> Iterator[Change]:
        values: Values = getattr(self, metric.number)
        for _ in range(len(values)):
            yield Change(metric, "", values.popleft())

    def _means(self) -> dict[str, float]:
        """Over the steps since the last look."""
        counts = self.steps, self.tokens, self.computed
        steps, tokens, computed = (now - before for now, before in zip(counts, self._looked, strict=True))
        self._looked = counts
        return {
            "batch_tokens": tokens / steps if steps else 0.0,
            "padding_ratio": max(0.0, 1 - tokens / computed) if computed else 0.0,
        }


def reason_of(error: BaseException) -> str:
    """How what failed with `error` ended."""
    if isinstance(error, Cancelled):
        return "cancelled"
    return "deadline" if isinstance(error, DeadlineExceeded) else "error"
