"""Buckets: the few sizes that micro-batches of packed tokens are filled up to, so that a CUDA graph fits many of them.

What fills up are tokens of sequences that nobody asks for. It knows no graphs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from backend.tasks.text import stepped

_STEPS = 8
_TOKENS, _LONGEST, _SEQUENCES = 128, 128, 8
"""The least of each; attention works in blocks of 128 tokens, so a smaller bound on the length gains nothing."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """What a graph is made for."""

    tokens: int
    longest: int
    sequences: int

    @classmethod
    def of(cls, lengths: NDArray[np.int64]) -> Bucket:
        """The smallest that these sequences fit in, together with those that fill it up.

        Those are an eighth of the tokens at most, from 1,024 tokens on.
        """
        count, longest = int(lengths.sum()), _doubled(int(lengths.max()), _LONGEST)
        tokens = stepped(count)
        fillers = -(-(tokens - count) // longest)
        return cls(tokens, longest, _doubled(len(lengths) + fillers, _SEQUENCES))

    def starts(self, lengths: NDArray[np.int64]) -> NDArray[np.int32]:
        """Where each sequence begins, then those that fill up, none too long, and empty ones.  # [sequences + 1]"""
        starts = np.full(self.sequences + 1, self.tokens, np.int32)
        ends = np.cumsum(lengths)
        fillers = np.arange(ends[-1] + self.longest, self.tokens, self.longest)
        starts[0], starts[1 : len(ends) + 1] = 0, ends
        starts[len(ends) + 1 : len(ends) + 1 + len(fillers)] = fillers
        return starts


def _doubled(value: int, least: int) -> int:
    """The first of `least` and the powers of two above it that is no less."""
    return max(least, 1 << (value - 1).bit_length())


def usual(most: int, longest: int) -> list[Bucket]:
    """Buckets that full micro-batches of `most` tokens fall into, the largest first, and some of single texts.

    Sorted by length and cut, a micro-batch has texts of half its longest one's length, or of a quarter.
    """
    full = stepped(most)
    bounds = [bound for bound in (128, 256, 512) if bound < 2 * longest]
    kinds = [(bound, times * full // bound) for times in (2, 4) for bound in bounds] + [(128, 8 * full // 128)]
    sizes = (full, full - max(_TOKENS, full // (2 * _STEPS)))
    found = [Bucket(size, bound, _doubled(count, _SEQUENCES)) for size in sizes for bound, count in kinds if size > 0]
    return [*dict.fromkeys(found + [Bucket.of(np.array([size])) for size in (512, 384, 256, 128) if size <= longest])]
