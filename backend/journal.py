"""Journal: one line of JSON a request, once it is over, and its spans where somebody collects them.

It knows neither Triton nor what was asked. No prompt and no answer can stand in a line: of all that callers send it
takes the request's id alone, escaped and cut. It goes to the server's output through a reporter, so to the launcher's
log file.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from backend import spans
from backend.asked import Asked

LONGEST = 80
"""Characters of a request's id."""


@dataclass(slots=True)
class Entry:
    """What one request's line will say; of no journal, nothing is written. Times are time.monotonic()."""

    journal: Journal | None = None
    asked: Asked | None = None
    arrived: float = field(default_factory=time.monotonic)
    begun: float = 0.0
    """When its first step was sent; 0 as for `first`."""
    first: float = 0.0
    """When its first token was there; 0: not so far, or there are none."""
    last: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    """tokens_in, tokens_out or pieces."""
    reasons: set[str] = field(default_factory=set)
    """How its sequences ended."""

    def add(self, name: str, number: int) -> None:
        self.counts[name] = self.counts.get(name, 0) + number

    def close(self, error: BaseException | None = None) -> None:
        """The request is over."""
        if self.journal:
            self.journal.write(self, error)


class Journal:
    """One model's."""

    def __init__(self, report: Callable[[str], None], on: bool = True, model: str = "") -> None:
        """`model` is its name, for its spans; a line has it from `report`."""
        self._report, self._on, self._model = report, on, model
        self._spans = spans.from_environment(os.environ)

    def entry(self, asked: Asked) -> Entry:
        """For a request that arrives now."""
        return Entry(self, asked)

    def write(self, entry: Entry, error: BaseException | None = None) -> None:
        """Its line; a failure names its class only: a message may quote what was sent."""
        now = time.monotonic()
        if self._on:
            self._report(json.dumps(_line(entry, error, now)))
        if self._spans and entry.asked and (trace := entry.asked.trace):
            attributes = {"model": self._model, "request_id": safe(entry.asked.request_id)}
            self._spans.add(trace, entry, now, spans.Told(attributes, type(error).__name__ if error else ""))


def _line(entry: Entry, error: BaseException | None, now: float) -> dict[str, object]:
    line: dict[str, object] = {"event": "request"}
    if entry.asked and (name := entry.asked.request_id):
        line["id"] = safe(name)
    line |= entry.counts
    if entry.first:
        line["ttft"] = round(entry.first - entry.arrived, 6)
    line["seconds"] = round(now - entry.arrived, 6)
    if error:
        return {**line, "error": type(error).__name__}
    return {**line, "finish": ",".join(sorted(entry.reasons)) or "stop"}


def safe(text: str) -> str:
    """What a caller sent, in printable ASCII that fits a line."""
    return ascii(text[:LONGEST])[1:-1][:LONGEST]
