"""Job: the requests that Triton batched, while they are served. It knows neither ranks nor threads."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from backend.errors import ServingError
from backend.tasks.task import Array, Row, Task

_log = logging.getLogger(__name__)


class Asked(Protocol):
    """One request; exactly one of the two ways of answering is used, once."""

    def rows(self) -> list[Row]:
        """Its inputs; InvalidInput where they cannot be read."""

    def answer(self, outputs: dict[str, Array]) -> None: ...

    def fail(self, error: Exception) -> None: ...


@dataclass
class Request:
    """What one request is made of while it is served."""

    asked: Asked
    items: list[Any] = field(default_factory=list)
    pieces: list[range] = field(default_factory=list)
    """Each item's, by their places in the job."""
    settled: bool = False

    def settle(self, outcome: dict[str, Array] | Exception) -> None:
        """Answer or fail it, once: whatever comes later is passed over. It does not raise."""
        if self.settled:
            return
        self.settled = True
        try:
            if isinstance(outcome, Exception):
                self.asked.fail(outcome)
            else:
                self._answer(outcome)
        except Exception:  # nobody is left to tell
            _log.exception("a response could not be sent")

    def _answer(self, outputs: dict[str, Array]) -> None:
        try:
            self.asked.answer(outputs)
        except Exception as error:  # tensors that Triton does not take
            self.asked.fail(error)


class Job:
    """The requests that Triton batched: their pieces, cut into micro-batches, and the answers so far."""

    def __init__(self, task: Task, requests: list[Request], pieces: list[Any]) -> None:
        self.requests, self.pieces = requests, pieces
        self.left = task.cut(pieces) if pieces else []
        if sorted(place for places in self.left for place in places) != [*range(len(pieces))]:
            raise ServingError(f"{len(pieces)} pieces were not cut into micro-batches one by one")
        self.missing = len(pieces)
        self.answers: list[Any] = [None] * len(pieces)

    def fill(self, places: Sequence[int], answers: Sequence[Array]) -> bool:
        """Take the answers of a micro-batch; whether they were the last."""
        if len(answers) != len(places):
            raise ServingError(f"the ranks answered with {len(answers)} arrays for {len(places)} pieces")
        for place, answer in zip(places, answers, strict=True):
            self.answers[place] = answer
        self.missing -= len(places)
        return self.missing == 0

    def fail(self, error: Exception) -> None:
        """End its requests; what the ranks still compute of it is not wanted."""
        self.left = []
        for request in self.requests:
            request.settle(error)
