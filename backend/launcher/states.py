"""What each loaded model last said of itself, gathered from a server's lines. It asks nobody."""

from __future__ import annotations

import re
from collections import Counter

OWN = "tritonspeed | "
"""Opens every line that a model of ours prints: `tritonspeed | MODEL | text`."""

_LIFE = re.compile(r"I\d{4} [\d:.]+ \d+ model_lifecycle\.cc:\d+\] \"?successfully (un)?loaded '([^']+)'")
_TROUBLE = ("down: ", "has failed for good")
_WELL = "ready in "


class States:
    """One thread tells it lines, others may ask."""

    def __init__(self) -> None:
        self._loaded: Counter[str] = Counter()
        self._said: dict[str, str] = {}

    def tell(self, line: str) -> None:
        """Take note of one line, if it is one of those that count."""
        if life := _LIFE.match(line):
            self._live(life[2], -1 if life[1] else 1)
        elif line.startswith(OWN):
            model, _, text = line.removeprefix(OWN).partition(" | ")
            if text.startswith(_TROUBLE):
                self._said[model] = text
            elif text.startswith(_WELL):
                self._said.pop(model, None)

    @property
    def loaded(self) -> list[str]:
        """Models that the server has."""
        return sorted(model for model, count in dict(self._loaded).items() if count > 0)

    def trouble(self, model: str) -> str | None:
        """Why it does not serve, in its own words."""
        return self._said.get(model)

    def _live(self, model: str, change: int) -> None:
        """One version came or went: a reload counts up before it counts down."""
        self._loaded[model] += change
        if self._loaded[model] < 1:
            self._said.pop(model, None)
