"""Watchdog: one thread that ends waits which have lasted too long. It does not know what is waited for.

gRPC's blocking iterator takes no time limit for one message, and a timer for each would start a thread a chunk.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from time import monotonic

_LINGER = 5.0
"""Seconds that the thread stays without anything to watch."""


class Watchdog:
    """Calls `expire` of each wait that is not over in time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waits: dict[object, tuple[float, Callable[[], object]]] = {}
        self._wakes = inf  # when the thread looks next
        self._running = False

    @contextmanager
    def limit(self, seconds: float | None, expire: Callable[[], object]) -> Iterator[None]:
        """While the body runs longer than `seconds`, `expire` is called once, from another thread."""
        if seconds is None:
            yield
            return
        wait = object()
        self._add(wait, monotonic() + seconds, expire)
        try:
            yield
        finally:
            with self._changed:
                self._waits.pop(wait, None)

    def _add(self, wait: object, due: float, expire: Callable[[], object]) -> None:
        with self._changed:
            self._waits[wait] = due, expire
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="tritonspeed-watchdog", daemon=True).start()
            elif due < self._wakes:
                self._changed.notify()

    def _run(self) -> None:
        while (late := self._next_late()) is not None:
            for expire in late:
                expire()

    def _next_late(self) -> list[Callable[[], object]] | None:
        """Sleep until a wait is due; None when there has been none for a while."""
        with self._changed:
            now = monotonic()
            self._wakes = min((due for due, _ in self._waits.values()), default=now + _LINGER)
            self._changed.wait(max(0.0, self._wakes - now))
            now = monotonic()
            late = [wait for wait, (due, _) in self._waits.items() if due <= now]
            self._running = bool(self._waits) or now < self._wakes
            return [self._waits.pop(wait)[1] for wait in late] if self._running else None
