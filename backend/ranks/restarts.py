"""Restarts: when a rank group's owner loads it again, and when it gives up. It knows neither ranks nor requests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from backend.config import EngineConfig
from backend.errors import serving

SETTLED = 60.0
"""Seconds of service after which a failure counts as the first: the pause before a restart doubles with each other."""
SLICE = 0.5
"""Seconds of a pause after which the owner may look after other things."""
LONGEST = 30.0
"""Seconds of the longest pause."""


class Restarts:
    """One owner's failures so far; its own thread uses it."""

    def __init__(self, config: EngineConfig, closing: threading.Event, report: Callable[[str], None]) -> None:
        self.failures = 0
        """Since it last served for long."""
        self._config, self._closing, self._report = config, closing, report
        self._since = time.monotonic()

    def served(self) -> None:
        """It serves from now on."""
        self._since = time.monotonic()

    def again(self, load: Callable[[], None], meanwhile: Callable[[], None] | None = None) -> bool:
        """Pause and load until that works, slower each time; False after max_restarts, or once `closing` is set.

        What loads and fails again soon counts with what does not load: it would do so for ever. `meanwhile` is called
        now and then during the pauses.
        """
        self.failures = 0 if time.monotonic() - self._since > SETTLED else self.failures
        while self.failures < self._config.max_restarts:
            self.failures += 1
            if self._closed_within(self._pause(), meanwhile):
                return False
            try:
                load()
                return True
            except Exception as failure:
                self._report(f"restart {self.failures} failed: {serving(failure)}")
        return False

    def _closed_within(self, seconds: float, meanwhile: Callable[[], None] | None) -> bool:
        while meanwhile and seconds > SLICE:
            if self._closing.wait(SLICE):
                return True
            meanwhile()
            seconds -= SLICE
        return self._closing.wait(seconds)

    def _pause(self) -> float:
        doublings = min(self.failures - 1, 64)  # a larger power would not fit a float
        return min(LONGEST, self._config.restart_backoff * 2.0**doublings)
