"""How a small matrix product is cut into programs, by its size alone; it knows neither kernels nor what it is for.

At few tokens a product takes as long as its weights take to arrive: what matters is that every processor has some
32 KiB on their way (4 TB/s times 1 µs of latency, over 132 processors) and that programs come out even.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

PROCESSORS = 132
"""Of an H100 or H200. Rules lean on it, results do not."""


class Shape(NamedTuple):
    """One program's part, and how it runs."""

    rows: int
    """Outputs of a program; with a gate, as many gates and as many that are gated."""
    columns: int
    """Of the weights, taken at once."""
    warps: int
    stages: int
    """Loads under way at a time, through shared memory; 1: straight to registers."""
    splits: int = 1
    """Programs that share the columns of the same outputs; a second kernel adds their sums."""


@lru_cache(maxsize=1024)
def shape(tokens: int, outputs: int, width: int, gated: bool, size: int) -> Shape | None:
    """For [tokens, width] by [outputs, width] of elements of so many bytes; None: the library's product is better."""
    if tokens == 1:
        return _vector(outputs, width, gated, size)
    return _matrix(tokens, outputs, width, gated, size)


def _vector(outputs: int, width: int, gated: bool, size: int) -> Shape:
    """Multiply and add: 16 KiB a program, in registers."""
    columns = even(width, 1024)
    rows = 8 if outputs >= 16 * PROCESSORS else 4
    if gated or size == 4:
        rows //= 2
    return Shape(rows, columns, warps=4, stages=1)


def _matrix(tokens: int, outputs: int, width: int, gated: bool, size: int) -> Shape | None:
    """Tensor cores: 16 KiB a stage."""
    if size == 4:
        return None  # float32 is for checks; its exact product has no use for tensor cores
    if outputs >= 64 * PROCESSORS:
        return Shape(32 if gated else 64, even(width, 128), warps=4, stages=4)
    rows = 32 if outputs >= 32 * (PROCESSORS - 8) else 16
    return Shape(rows, even(width, 256), warps=4, stages=4)


def even(width: int, most: int) -> int:
    """The greatest power of two up to `most` that divides the width; `most` where that would be too narrow."""
    divisor = min(width & -width, most)
    return divisor if divisor >= 128 else most
