"""How a product with packed weights is computed and cut into programs, by its size alone.

Codes are few bytes, so programs take more rows than those of shape.py to have as many on their way. The rules are
reasoned from those measured there; `bench_steps --parts packed --sweep` says what is best on a GPU.
"""

from __future__ import annotations

from functools import lru_cache

from backend.compute.dense.shape import PROCESSORS, Shape, evenness

TILED = 256
"""Tokens up to which tensor cores that unpack codes themselves beat the library's product of weights made full."""
SCALED = TILED + 1
"""Tokens from which fp8 weights meet activations rounded to fp8, where the GPU multiplies them."""
GROUPS = (32, 64, 128, 256, 512, 1024)
"""Sizes of groups that kernels take, besides whole rows."""


def taken(group: int, width: int, per: int) -> bool:
    """Whether the kernels for few tokens take it; `per`: codes of a byte."""
    return (group == width or group in GROUPS) and width % (4 * per) == 0


@lru_cache(maxsize=1024)
def vector(outputs: int, width: int, gated: bool, per: int) -> Shape:
    """For one token: a thread takes four words of each row at once; `columns` counts words.

    Rows of up to 4 KiB are asked for all at once or in two turns, longer ones ahead of what is multiplied. What is
    done to inputs many rows share, as far as registers hold 64 KiB of codes of all programs on a processor.
    """
    words = width // (4 * per)
    columns = max(32, min(512, 1 << (words - 1).bit_length())) if words <= 1024 else _covering(words, 256, least=32)
    rows = 8 * per // (2 if gated else 1)
    while rows > 1 and outputs < rows * 2 * PROCESSORS:
        rows //= 2
    return Shape(rows, columns, warps=max(1, columns // 128), stages=1 if words <= 1024 else 4)


@lru_cache(maxsize=1024)
def matrix(tokens: int, outputs: int, width: int, group: int, per: int, itemsize: int = 2) -> tuple[Shape, int]:
    """For 2 tokens and more, and the tokens of a program; splits where there are few programs.

    Two or three programs fit a processor: while one waits for tensor cores or memory, others unpack. More tokens want
    more rows, since each program reads all of x.
    """
    size = next((size for size in (16, 32, 64) if tokens <= size), 128)
    if itemsize == 4:  # for checks; no tensor cores
        size, rows, most, stages = min(size, 32), 64, 64, 2
    elif size <= 32:
        rows, most, stages = 64, 256 if per == 2 or size == 16 else 128, 4 if (per == 2) == (size == 16) else 3
    else:
        rows, most, stages = 128, 128 if size == 64 else 64, 3 if size == 64 else 4
    columns = most if group in GROUPS and group < width else _covering(width, most, least=64)
    programs = -(-outputs // rows) * -(-tokens // size)
    splits = _splits(programs, width // max(1024, 4 * columns))
    return Shape(rows, columns, warps=rows // 16, stages=stages, splits=splits), size


def _splits(programs: int, most: int) -> int:
    """The fewest that give so many programs that few processors are idle and most have two."""
    useful = [splits for splits in (1, 2, 4, 8) if splits <= max(most, 1)]
    good = (each for each in useful if programs * each * 4 >= PROCESSORS * 5 and evenness(programs * each) >= 0.7)
    return next(good, max(useful))


def _covering(width: int, most: int, least: int) -> int:
    """The greatest power of two up to `most` that divides the width, or else one that leaves little over."""
    divisor = min(width & -width, most)
    return divisor if divisor >= most // 4 else max(least, min(most, 1 << (width - 1).bit_length()))
