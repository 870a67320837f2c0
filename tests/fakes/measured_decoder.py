"""A Decoder in a rank that tells how much memory of its own the process has taken since before it loaded."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import deepspeed  # noqa: F401 (what libraries take counts before)

from backend.compute.decoder import Decoder
from backend.generation.plan import Plan, Sampled
from backend.ranks.rank import Birth, Deferred


def resident() -> int:
    """Bytes in memory that no file holds: what the kernel cannot just drop."""
    found = re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


class Measured(Decoder):
    def __init__(self, birth: Birth, progress: Callable[[str], None]) -> None:
        self._most, self._before = 0, resident()

        def look(text: str) -> None:
            self._look()
            progress(text)

        super().__init__(birth, look)
        self._look()

    def _look(self) -> None:
        self._most = max(self._most, resident() - self._before)

    def step(self, plan: Plan) -> Sampled | Deferred:
        found = super().step(plan)
        self._look()
        return found

    def most(self) -> int:
        """The largest growth that was seen: while loading, and after each step."""
        return self._most
