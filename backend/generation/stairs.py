"""Stairs: what steps take by how many tokens they have. It sees counts and times only.

A device multiplies whole tiles of tokens, so that one token more may cost as much as a hundred. No line can say so.
"""

from __future__ import annotations

STAIR = 64
"""Tokens; compute.prompt_graphs captures steps with prompts as finely."""
SLOWER, FASTER = 0.5, 0.1
"""What a step counts against those of its stair before it: a stair that is too high is left at once."""
MOST = 1.5
"""Times what its stair takes that a step may count for: one that something else held up says nothing of its tokens."""
FORGET = 1 / 4096
"""What a stair above the last step comes down by, so that it is tried again some time."""
OVER = 1.1
"""Times the target that a stair may take."""


class Stairs:
    """Steps with prompts, as they are received."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def learn(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens, of whatever kind, took so long."""
        stair = _stair(tokens)
        known = self._seconds.setdefault(stair, seconds)
        more = min(seconds, MOST * known) - known
        self._seconds[stair] += (SLOWER if more > 0 else FASTER) * more
        for above in self._seconds:
            if above > stair:
                self._seconds[above] *= 1 - FORGET

    def lowered(self, tokens: int, target: float) -> int:
        """So many tokens, or the most of a lower stair where theirs is known to take longer than the target."""
        stair = _stair(tokens)
        while stair > 1 and self._seconds.get(stair, 0.0) > OVER * target:
            stair -= 1
        return min(tokens, stair * STAIR)


def _stair(tokens: int) -> int:
    return -(-tokens // STAIR)
