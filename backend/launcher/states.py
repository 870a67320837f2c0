"""What each loaded model last said of itself, gathered from a server's lines. It asks nobody."""

from __future__ import annotations

import re
from collections import Counter

OWN = "tritonspeed | "
"""Opens every line that a model of ours prints: `tritonspeed | MODEL | text`."""

_LIFE = re.compile(r"I\d{4} [\d:.]+ \d+ model_lifecycle\.cc:\d+\] \"?successfully (un)?loaded '([^']+)'")
_GIVEN_UP = "has failed for good"
_TROUBLE = ("down: ", _GIVEN_UP)
_WELL = "ready in "


class States:
    """One thread tells it lines, one other what was lost; any may ask."""

    def __init__(self) -> None:
        self._loaded: Counter[str] = Counter()
        self._said: dict[str, str] = {}
        self._lost: dict[str, str] = {}

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

    @property
    def failed(self) -> list[str]:
        """Models that do not come back by themselves: loaded ones that have given up, and lost ones."""
        given_up = [model for model in self.loaded if self._said.get(model, "").startswith(_GIVEN_UP)]
        return sorted({*given_up, *self.lost})

    @property
    def lost(self) -> list[str]:
        """Models that failed and are not loaded any more, though nobody asked for that."""
        return sorted(dict(self._lost).keys() - set(self.loaded))

    def trouble(self, model: str) -> str | None:
        """Why it does not serve, in its own words; of a lost one, in those of who lost it."""
        if self._loaded[model] > 0:
            return self._said.get(model)
        return self._lost.get(model)

    def lose(self, model: str, why: str) -> None:
        """From now on it counts as failed until it is loaded again, or forgotten."""
        self._lost[model] = why

    def forget(self, model: str) -> None:
        """It is not to be served any more."""
        self._lost.pop(model, None)

    def _live(self, model: str, change: int) -> None:
        """One version came or went: a reload counts up before it counts down."""
        self._loaded[model] += change
        if change > 0:
            self._lost.pop(model, None)
        if self._loaded[model] < 1:
            self._said.pop(model, None)
