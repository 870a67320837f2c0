"""How a small matrix product is cut into programs, by its size alone; it knows neither kernels nor what it is for.

At few tokens a product takes as long as its weights take to arrive: what matters is that every processor has some
32 KiB on their way (4 TB/s times 1 µs of latency, over 132 processors) and that programs come out even. The rules are
within 2 % of the best of some twenty shapes, and of cuBLAS, for all products of Llama 3's 8B and 1B on an H200.
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

    @property
    def takes_norm(self) -> bool:
        """Whether a norm inside costs matrix_kernel less than a kernel before it: each program repeats it."""
        return self.rows >= 64 and self.columns >= 256 and self.splits == 1


@lru_cache(maxsize=1024)
def shape(tokens: int, outputs: int, width: int, gated: bool, size: int) -> Shape | None:
    """For [tokens, width] by [outputs, width] of elements of so many bytes; None: the library's product is better."""
    if tokens == 1:
        chosen = _vector_gated(width) if gated else _vector(outputs, width)
        return chosen._replace(rows=_rows(chosen.rows if size < 4 else chosen.rows // 2, outputs))
    if size == 4 or tokens > 16:
        return None  # float32 is for checks; its exact product has no use for tensor cores
    return _matrix_gated(outputs, width) if gated else _matrix(outputs, width)


def _vector(outputs: int, width: int) -> Shape:
    """Multiply and add, in registers."""
    if outputs >= 64 * PROCESSORS:
        columns = even(width, 2048, 512)
        return Shape(min(4, 4096 // columns), columns, warps=4, stages=1)
    few = outputs <= 16 * PROCESSORS
    if width <= 2048:  # whole rows
        columns = even(width, 2048, 512)
        return Shape(4 if few else 2, columns, warps=max(4, columns // 256) if few else 4, stages=1)
    if outputs <= 32 * PROCESSORS:  # so few programs that each must ask for more than its registers hold
        return Shape(8, even(width, 512, 512), warps=4, stages=4)
    return Shape(4, even(width, 512, 512), warps=2, stages=1)  # small programs, all of them under way at once


def _vector_gated(width: int) -> Shape:
    columns = even(width, 2048 if width <= 2048 else 1024, 512)
    return Shape(2, columns, warps=max(2, columns // 256), stages=1)


def _rows(rows: int, outputs: int) -> int:
    """Fewer where not every processor would have a program."""
    while rows > 1 and outputs < rows * PROCESSORS:
        rows //= 2
    return max(rows, 1)


def _matrix(outputs: int, width: int) -> Shape | None:
    """Tensor cores, 64 rows a program; splits where there are too few programs."""
    programs = -(-outputs // 64)
    if evenness(programs) >= 0.7:
        many = programs > PROCESSORS  # two programs fit a processor, or one that asks for more at once
        return Shape(64, even(width, 128), 4, 4) if many else Shape(64, even(width, 256), 4, 3)
    for splits, stages in ((4, 4), (8, 3)):
        if programs * splits <= 2 * PROCESSORS and evenness(programs * splits) >= 0.8 and width >= splits * 3 * 128:
            return Shape(64, even(width, 128), 4, stages, splits)
    return None


def _matrix_gated(outputs: int, width: int) -> Shape | None:
    return Shape(64, even(width, 256), 4, 3) if evenness(-(-outputs // 64)) >= 0.7 else None


def evenness(programs: int) -> float:
    """The part of the processors at work, where programs take equal time."""
    return programs / (-(-programs // PROCESSORS) * PROCESSORS)


def even(width: int, most: int, least: int = 128) -> int:
    """The greatest power of two from `least` to `most` that divides the width; where none does, one that covers it."""
    divisor = min(width & -width, most)
    return divisor if divisor >= least else min(most, 1 << (width - 1).bit_length())
