"""Journal: one line of JSON a request, once it is over. It knows neither Triton nor what was asked.

No prompt and no answer can stand in it: of all that callers send it takes the request's id alone, escaped and cut. It
goes to the server's output through a reporter, so to the launcher's log file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

LONGEST = 80
"""Characters of a request's id."""


class Named(Protocol):
    """One request, as far as the journal is concerned."""

    @property
    def request_id(self) -> str: ...


@dataclass(slots=True)
class Entry:
    """What one request's line will say; of no journal, nothing is written. Times are time.monotonic()."""

    journal: Journal | None = None
    asked: Named | None = None
    arrived: float = field(default_factory=time.monotonic)
    first: float = 0.0
    """When its first token was there; 0: not so far, or there are none."""
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

    def __init__(self, report: Callable[[str], None], on: bool = True) -> None:
        self._report, self._on = report, on

    def entry(self, asked: Named) -> Entry:
        """For a request that arrives now."""
        return Entry(self, asked)

    def write(self, entry: Entry, error: BaseException | None = None) -> None:
        """Its line; a failure names its class only: a message may quote what was sent."""
        if self._on:
            self._report(json.dumps(_line(entry, error, time.monotonic())))


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
