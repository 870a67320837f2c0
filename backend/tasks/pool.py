"""Pool: the pieces of all requests that wait for the ranks, cut into micro-batches together.

Callers put, the service's thread takes. It knows neither ranks nor Triton, nor what a piece is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from backend.errors import ServingError
from backend.tasks.request import Request

AHEAD = 4
"""Micro-batches that wait, from which on callers are kept waiting."""

Cut = Callable[[Sequence[Any]], list[list[int]]]


class Waiting(NamedTuple):
    """A piece, by its request and its place there; `age` counts up."""

    age: int
    request: Request
    place: int

    @property
    def piece(self) -> Any:
        return self.request.pieces[self.place]


Batch = list[Waiting]


class Pool:
    """Micro-batches that wait. They are cut anew whenever more pieces come, so that early and late ones share them."""

    def __init__(self, cut: Cut) -> None:
        self._cut = cut
        self._batches: list[Batch] = []
        self._count = 0
        self._changed = threading.Condition()

    def put(self, requests: Sequence[Request], seconds: float) -> bool:
        """Add their pieces once there is room; whether there was any. Raises where the task does not cut them well."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._batches) < AHEAD, seconds):
                return False
            before = sorted(waiting for batch in self._batches for waiting in _open(batch))
            self._batches = self._together(before + self._aged(requests))
            self._changed.notify_all()
            return True

    def take(self, seconds: float, full: bool) -> Batch:
        """The micro-batch with the oldest piece, waiting for one; nothing where there is none.

        `full`: nothing either where there is only one, which may yet grow.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._batches, seconds)
            found: Batch = []
            while not found and len(self._batches) > full:
                oldest = min(range(len(self._batches)), key=lambda at: min(self._batches[at]).age)
                found = _open(self._batches.pop(oldest))
            self._changed.notify_all()
            return found

    def clear(self) -> Batch:
        """All that waits, which is then no longer here."""
        with self._changed:
            found = [waiting for batch in self._batches for waiting in batch]
            self._batches = []
            self._changed.notify_all()
            return found

    def _aged(self, requests: Sequence[Request]) -> Batch:
        found = []
        for request in requests:
            for place in range(len(request.pieces)):
                self._count += 1
                found.append(Waiting(self._count, request, place))
        return found

    def _together(self, pieces: Batch) -> list[Batch]:
        cut = self._cut([waiting.piece for waiting in pieces]) if pieces else []
        if sorted(place for places in cut for place in places) != [*range(len(pieces))]:
            raise ServingError(f"{len(pieces)} pieces were not cut into micro-batches one by one")
        return [[pieces[place] for place in places] for places in cut]


def _open(batch: Batch) -> Batch:
    """Without the pieces of requests that have failed meanwhile."""
    return [waiting for waiting in batch if not waiting.request.settled]
