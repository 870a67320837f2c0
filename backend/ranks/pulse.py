"""Pulse: when idle ranks are asked for a sign of life, and which of them owe one. It neither sends nor receives."""

from __future__ import annotations

import time
from collections.abc import Collection

EVERY = 5.0
"""Seconds of silence after which ranks are asked; half of the limit where that is shorter."""


class Pulse:
    """Of one group; `limit` seconds make a rank that owes an answer a hung one, 0: they are never asked."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._silence = min(EVERY, limit / 2)
        self._owing: set[int] = set()
        self._since = 0.0
        self.heard()

    @property
    def due(self) -> bool:
        """Whether to ask now."""
        return bool(self.limit) and not self._owing and time.monotonic() - self._since > self._silence

    @property
    def owing(self) -> bool:
        """Whether an answer is to come."""
        return bool(self._owing)

    @property
    def hung(self) -> list[int]:
        """Ranks that have owed an answer for too long."""
        return sorted(self._owing) if self._owing and time.monotonic() - self._since > self.limit else []

    def ask(self, ranks: Collection[int]) -> None:
        """They are asked now."""
        self._owing, self._since = {*ranks}, time.monotonic()

    def answer(self, rank: int) -> None:
        """It lives."""
        self._owing.discard(rank)
        if not self._owing:
            self._since = time.monotonic()

    def heard(self) -> None:
        """All live: they have answered a question, or have just been started."""
        self._owing.clear()
        self._since = time.monotonic()
