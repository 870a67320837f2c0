"""Watch: ends requests whose callers have gone, or whose time limit has passed, wherever they are.

It knows neither ranks nor batches: what has ended is skipped by whoever comes to its pieces.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Iterable

from backend.blame import tell
from backend.errors import Cancelled, DeadlineExceeded
from backend.tasks.request import Request

POLL = 0.1
"""Seconds between two looks."""
ASKED = 50
"""Callers that are asked in one look whether they are still there: each costs 100 µs."""

_log = logging.getLogger(__name__)


class Watch:
    """One thread over all requests that are open. `start`, then `add` from any thread, then `close`."""

    def __init__(self) -> None:
        self._open: deque[Request] = deque()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, requests: Iterable[Request]) -> None:
        """Look after these too."""
        self._open.extend(requests)

    def close(self) -> None:
        """Look no more."""
        self._closing.set()
        if self._thread.ident:
            self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(POLL):
            try:
                self._look()
            except Exception as error:  # the others must still be looked after
                tell(_log, "a request could not be looked after", error)

    def _look(self) -> None:
        """All for their time limit; some, in turn, for their callers."""
        for _ in range(len(self._open)):
            request = self._open.popleft()
            if request.late:
                request.settle(DeadlineExceeded("the request's time limit passed before it was done"))
            if not request.settled:
                self._open.append(request)
        for _ in range(min(ASKED, len(self._open))):
            request = self._open.popleft()
            if request.left():
                request.settle(Cancelled("the caller went away"))
            else:
                self._open.append(request)
