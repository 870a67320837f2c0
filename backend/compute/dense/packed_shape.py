"""How a product with packed weights is computed and cut into programs, by its size alone.

The rules give what sweeps of 17 to 108 shapes found best for the products of Llama 3's 8B on an H200, or come within
5 % of it: int4 at 1, 8, 32 and 128 tokens, int8 at 8, 64 and 128 (`bench_steps --parts packed --sweep`).
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
    """For one token: small programs, all of them under way at once; `columns` counts words.

    Loads ahead of what is multiplied, by way of shared memory, took twice as long.
    """
    columns, rows = _covering(width // (4 * per), 256, least=32), 4
    while rows > 1 and outputs < rows * 2 * PROCESSORS:
        rows //= 2
    return Shape(rows, columns, warps=max(1, columns // 128), stages=1)


@lru_cache(maxsize=1024)
def matrix(tokens: int, outputs: int, width: int, group: int, per: int, itemsize: int = 2) -> tuple[Shape, int]:
    """For 2 tokens and more, and the tokens of a program; splits where there are few programs.

    Up to 8 tokens programs are small, and each warp multiplies for itself. A program's loads take no more than SHARED
    where `least` tiles do, so that several fit a processor: while one waits for tensor cores or memory, others unpack.
    Codes of 8 bits for more than 64 tokens leave no registers for a second program: there one has more loads under way.
    More tokens want more rows, since each program reads all of x.
    """
    size = next((size for size in (8, 16, 32, 64) if tokens <= size), 128)
    alone = per == 1 and size == 128
    if itemsize == 4:  # for checks; no tensor cores
        size, rows, most = min(max(size, 16), 32), 64, 64
    elif size <= 32:
        rows, most = 32 if size == 8 else 64, 256 if per == 2 else 128
    else:
        rows, most = 128, 128
    columns = most if group in GROUPS and group < width else _covering(width, most, least=64)
    least = 4 if alone else 3 if size == 8 or (per == 1 and size == 64) else 2
    stages = min(3 if size == 8 else 4, max(least, SHARED // (columns * (rows // per + size * itemsize))))
    programs = -(-outputs // rows) * -(-tokens // size)
    wanted = {8: 3.5, 16: 2.75, 32: 2.75, 64: 1.25, 128: 0.7 if alone else 1.25}[size]  # to a processor
    splits = _splits(programs, width // max(512, 2 * columns), least=int(PROCESSORS * wanted))
    return Shape(rows, columns, warps=rows // 16, stages=stages, splits=splits), size


SHARED = 48 << 10
"""Bytes of shared memory."""


def _splits(programs: int, most: int, least: int) -> int:
    """The fewest that give so many programs and leave few processors idle."""
    useful = [splits for splits in (1, 2, 4, 8) if splits <= max(most, 1)]
    good = (each for each in useful if programs * each >= least and evenness(programs * each) >= 0.7)
    return next(good, max(useful))


def _covering(width: int, most: int, least: int) -> int:
    """The greatest power of two up to `most` that divides the width, or else one that leaves little over."""
    divisor = min(width & -width, most)
    return divisor if divisor >= most // 4 else max(least, min(most, 1 << (width - 1).bit_length()))
