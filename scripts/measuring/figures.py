"""Figures: what the arrival times of tokens say. Pure arithmetic."""

from __future__ import annotations

import math
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
    refused: str = ""
    """The error with which it ended, if it was not taken or its time passed: what came before is no answer."""

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
    """Rates over the whole round, latencies in ms, of the requests that were answered.

    With targets, refused ones are none of those within; without, and where one lacks tokens, ValueError.
    """
    answered = [trace for trace in traces if not trace.refused]
    if not targets:
        _check_all_answered(traces)
    for trace, output in zip(traces, outputs, strict=True):
        if not trace.refused and trace.tokens != output:
            raise ValueError(f"a request gave {trace.tokens} tokens instead of {output}")
    return _goodput(answered, len(traces), targets) | _rates(traces, prompts) | _latencies(answered)


def _check_all_answered(traces: Sequence[Trace]) -> None:
    if refused := [trace.refused for trace in traces if trace.refused]:
        raise ValueError(f"{len(refused)} of {len(traces)} requests were refused, which --slo counts: {refused[0]}")


def _goodput(answered: Sequence[Trace], count: int, targets: Targets | None) -> dict[str, float]:
    """Shares of all `count` requests."""
    if not targets:
        return {}
    within = sum(trace.within(targets) for trace in answered)
    return {"within": within / count, "refused": 1 - len(answered) / count}


def _rates(traces: Sequence[Trace], prompts: Sequence[int]) -> dict[str, float]:
    """Of those answered, until the last of them was; 0 where none was."""
    pairs = [(trace, prompt) for trace, prompt in zip(traces, prompts, strict=True) if not trace.refused]
    end = max((trace.end for trace, _ in pairs), default=math.inf)
    return {
        "tok/s": sum(trace.tokens for trace, _ in pairs) / end,
        "req/s": len(pairs) / end,
        "met/s": sum(trace.met(prompt) for trace, prompt in pairs) / end,
    }


def _latencies(answered: Sequence[Trace]) -> dict[str, float]:
    """Nothing of nobody: a 0 would look like a very fast one."""
    if not answered:
        return {}
    firsts, gaps = [trace.first for trace in answered], [gap for trace in answered for gap in trace.gaps]
    return {
        "ttft p50": 1e3 * statistics.median(firsts),
        "ttft p99": 1e3 * percentile(firsts, 0.99),
        "tpot": 1e3 * statistics.median(trace.per_token for trace in answered),
        "itl p50": 1e3 * percentile(gaps, 0.5),
        "itl p99": 1e3 * percentile(gaps, 0.99),
    }
