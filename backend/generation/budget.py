"""Budget: how many tokens of prompts a step may take, so that steps keep to a target time.

It sees counts and times only.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

FADE = 0.95
"""Weight of each step against the next: the line follows contexts that grow."""
STRETCH = 1.5
"""Times the target that a step may take while the queue is longer than target_ttft allows."""
PEAK_FADE = 0.99
"""What the largest step lately counts, step by step with prompts: the next may have twice as many tokens, not more, as
the line says little far from where it was seen."""
FEW = 1.0
"""Steps with prompts, each by its weight, below which one without moves the line and leaves its slope: a long stretch
of them would make what prompts cost forgotten."""
SAME = 1e-3
"""Steps that differ by less than this share of their mean tell nothing about the slope."""


class Budget:
    """The line time = fixed + per_token * tokens through the steps lately received, and where it meets the target."""

    def __init__(self, target: float, least: int, most: int, now: Callable[[], float] = time.monotonic) -> None:
        """`target` in seconds, 0: none, always `most`."""
        self._target, self._least, self._most, self._now = target, min(least, most), most, now
        self._sent: deque[tuple[float, int]] = deque()
        self._last, self._peak = 0.0, 0.0
        self._prompts = self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def sent(self, tokens: int) -> None:
        """A step was sent, with so many tokens of prompts."""
        if self._target:
            self._sent.append((self._now(), tokens))

    def received(self) -> None:
        """The oldest step sent is back. It began when it was sent, or when the one before it was done."""
        if self._target:
            now = self._now()
            sent, tokens = self._sent.popleft()
            self._learn(tokens, now - max(sent, self._last))
            self._last = now

    def tokens(self, late: bool = False) -> int:
        """Of prompts, in the next step; `late`: callers wait for their first token longer than they should."""
        if not self._target:
            return self._most
        if not self._x:
            return self._least
        fixed, per_token = self._line()
        target = self._target * (STRETCH if late else 1.0)
        return int(max(self._least, min(self._most, 2 * self._peak, (target - fixed) / per_token)))

    def _learn(self, x: int, y: float) -> None:
        if not x and self._x and self._prompts < FEW:
            return self._move(y)
        if x:
            self._peak = max(self._peak * PEAK_FADE, x)
        self._prompts = self._prompts * FADE + (x > 0)
        self._weight = self._weight * FADE + 1
        self._x = self._x * FADE + x
        self._y = self._y * FADE + y
        self._xx = self._xx * FADE + x * x
        self._xy = self._xy * FADE + x * y

    def _move(self, y: float) -> None:
        """Towards so much time of a step without prompts; where the line goes through the origin it stays."""
        fixed, _ = self._line()
        up = (1 - FADE) * (y - fixed) if fixed else 0.0
        self._y += up * self._weight
        self._xy += up * self._x

    def _line(self) -> tuple[float, float]:
        """Fixed seconds and those for each token; through the origin, which errs to fewer tokens, if all were alike."""
        x, y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - x * x
        if spread > (SAME * x) ** 2:
            slope = (self._xy / self._weight - x * y) / spread
            if slope > 0:
                return y - slope * x, slope
        return 0.0, max(y / x, 1e-9)
