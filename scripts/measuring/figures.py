"""Figures: what the arrival times of tokens say. Pure arithmetic."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

PROMPT_RATE = 512.0
"""W2: tokens of the prompt for which a caller waits one second."""
READING_RATE = 4.0
"""W2: tokens a second after the first."""


class Targets(NamedTuple):
    """What callers were promised, seconds."""

    first: float
    per_token: float

    @classmethod
    def of(cls, text: str) -> Targets:
        """From milliseconds, as "500/30"."""
        first, per_token = (float(part) / 1e3 for part in text.split("/"))
        return cls(first, per_token)


@dataclass
class Trace:
    """One request: when it was due and when its tokens came, seconds from the round's start."""

    start: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """(time, number of tokens)."""

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.arrivals)

    @property
    def first(self) -> float:
        """Time to first token."""
        return self.arrivals[0][0] - self.start

    @property
    def end(self) -> float:
        return self.arrivals[-1][0]

    @property
    def per_token(self) -> float:
        """Time for each token after the first."""
        return (self.end - self.arrivals[0][0]) / max(1, self.tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Inter-token latencies: a response of k tokens counts as one gap and k - 1 of zero."""
        gaps = [later - earlier for (earlier, _), (later, _) in pairwise(self.arrivals)]
        return gaps + [0.0] * sum(count - 1 for _, count in self.arrivals)

    def met(self, prompt: int) -> bool:
        """Whether it came as fast as W2 asks: a prompt's length / 512 s to the first token, then 4 tok/s."""
        return self.first <= prompt / PROMPT_RATE and self.per_token <= 1 / READING_RATE

    def within(self, targets: Targets) -> bool:
        """Whether both its time to first token and its mean time for each later one keep to the targets."""
        return self.first <= targets.first and self.per_token <= targets.per_token


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which about this share lies; 0 of nothing."""
    ordered = sorted(values)
    return ordered[int(share * (len(ordered) - 1))] if ordered else 0.0


def figures(
    traces: Sequence[Trace], prompts: Sequence[int], outputs: Sequence[int], targets: Targets | None = None
) -> dict[str, float]:
    """Rates over the whole round, latencies in ms. ValueError where a request has not all its tokens."""
    for trace, output in zip(traces, outputs, strict=True):
        if trace.tokens != output:
            raise ValueError(f"a request gave {trace.tokens} tokens instead of {output}")
    end = max(trace.end for trace in traces)
    firsts, gaps = [trace.first for trace in traces], [gap for trace in traces for gap in trace.gaps]
    met = sum(trace.met(prompt) for trace, prompt in zip(traces, prompts, strict=True))
    within = {"within": sum(trace.within(targets) for trace in traces) / len(traces)} if targets else {}
    return within | {
        "tok/s": sum(outputs) / end,
        "req/s": len(traces) / end,
        "met/s": met / end,
        "ttft p50": 1e3 * statistics.median(firsts),
        "ttft p99": 1e3 * percentile(firsts, 0.99),
        "tpot": 1e3 * statistics.median(trace.per_token for trace in traces),
        "itl p50": 1e3 * percentile(gaps, 0.5),
        "itl p99": 1e3 * percentile(gaps, 0.99),
    }
