"""Request: what one caller asked, while it is served: its pieces and their answers so far. It knows no batches."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from typing import Any

from backend.asked import Asked
from backend.blame import tell
from backend.errors import InvalidInput
from backend.journal import Entry
from backend.metrics import TASK
from backend.tally import Tally, reason_of
from backend.tasks.task import Array, Task
from backend.tasks.text import Piece

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Request:
    """One request, from its rows to its answer."""

    asked: Asked
    tally: Tally = field(default_factory=lambda: Tally(TASK))
    """Where it counts when it is over."""
    entry: Entry = field(default_factory=Entry)
    """Its line in the journal."""
    arrived: float = field(default_factory=time.monotonic)
    items: list[Any] = field(default_factory=list)
    pieces: list[Any] = field(default_factory=list)
    """All items', end to end."""
    spans: list[slice] = field(default_factory=list)
    """Each item's part of the pieces."""
    answers: list[Any] = field(default_factory=list)
    """One a piece, as far as they have come."""
    missing: int = 0
    settled: bool = False
    deadline: float = inf
    _settling: threading.Lock = field(default_factory=threading.Lock)
    """The service's thread, the watch and callers may settle the same request."""

    def read(self, task: Task) -> None:
        """Its time limit, which counts from here, and its rows; InvalidInput where they cannot be read."""
        limit = self.asked.parameters().get("timeout", 0)
        if not isinstance(limit, int) or limit < 0:
            raise InvalidInput(f"timeout must be microseconds, a whole number from 0, not {limit!r:.80}")
        self.deadline = self.arrived + limit / 1e6 if limit else inf
        self.items = [task.parse(row) for row in self.asked.rows()]

    @property
    def late(self) -> bool:
        """Whether its time limit has passed."""
        return time.monotonic() > self.deadline

    def left(self) -> bool:
        """Whether its caller has gone without an answer; costs about 100 µs."""
        with self._settling:
            return not self.settled and self.asked.cancelled()

    def take(self, prepared: Iterable[list[Any]]) -> None:
        """Its pieces, by item."""
        for own in prepared:
            self.spans.append(slice(len(self.pieces), len(self.pieces) + len(own)))
            self.pieces.extend(own)
        self.missing = len(self.pieces)
        self.answers = [None] * self.missing

    def fill(self, place: int, answer: Array) -> bool:
        """Take a piece's answer; whether it was the last one."""
        self.answers[place] = answer
        self.missing -= 1
        return self.missing == 0

    def finish(self, task: Task) -> None:
        """Answer it from what has come; a fault of the task is its failure."""
        try:
            self.settle(self._outputs(task))
        except Exception as error:
            self.settle(error)

    def settle(self, outcome: dict[str, Array] | Exception) -> None:
        """Answer or fail it, once: whatever comes later is passed over. It does not raise."""
        with self._settling:
            if self.settled:
                return
            self.settled = True
            self._count(outcome)
        try:
            if isinstance(outcome, Exception):
                self.asked.fail(outcome)
            else:
                self._answer(outcome)
        except Exception as error:  # nobody is left to tell
            tell(_log, "a response could not be sent", error)
            self._close(error)
        else:
            self._close(outcome if isinstance(outcome, Exception) else None)

    def _close(self, error: Exception | None) -> None:
        """Its line in the journal."""
        self.entry.add("pieces", len(self.pieces))
        if tokens := sum(len(piece.ids) for piece in self.pieces if isinstance(piece, Piece)):
            self.entry.add("tokens_in", tokens)
        self.entry.close(error)

    def _count(self, outcome: dict[str, Array] | Exception) -> None:
        reason = reason_of(outcome) if isinstance(outcome, Exception) else "stop"
        self.tally.ended(reason, time.monotonic() - self.arrived)

    def _outputs(self, task: Task) -> dict[str, Array]:
        pairs = zip(self.items, self.spans, strict=True)
        return task.outputs([task.finish(item, self.pieces[own], self.answers[own]) for item, own in pairs])

    def _answer(self, outputs: dict[str, Array]) -> None:
        try:
            self.asked.answer(outputs)
        except Exception as error:  # tensors that Triton does not take
            self.asked.fail(error)
