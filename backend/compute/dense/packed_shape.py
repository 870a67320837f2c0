"""How a product with packed weights is computed and cut into programs, by its size alone.

The rules give what sweeps of 9 to 62 shapes found best for the products of Llama 3's 8B in int4 and int8 on an H200, or
come within 5 % of it, mostly; one of 128 tokens misses by up to 10 % (`bench_steps --parts packed --sweep`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from backend.compute.dense.shape import PROCESSORS, Shape, evenness

TILED = 256
"""Tokens up to which tensor cores that unpack codes themselves beat the library's product of weights made full."""
SCALED = 65
"""Tokens from which fp8 weights meet activations rounded to fp8, where the GPU multiplies them: below it both ways wait
for memory alone."""
ROOM = 227 << 10
"""Bytes of shared memory for a program on an H100 or H200."""
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
    columns, rows = _covering(width // (4 * per), 512 if per == 1 else 256, least=32), 4
    while rows > 1 and outputs < rows * 2 * PROCESSORS:
        rows //= 2
    return Shape(rows, columns, warps=max(1, columns // 128), stages=1)


class Tile(NamedTuple):
    """Programs for several tokens."""

    rows: int
    columns: int
    """At the most."""
    stages: int
    wanted: float
    """Programs to a processor, which splits make up for where there are fewer."""


TILES = {
    (2, 8): Tile(32, 256, 3, 3.5),
    (2, 16): Tile(64, 256, 3, 1.9),
    (2, 32): Tile(64, 256, 2, 2.75),
    (2, 64): Tile(128, 128, 2, 1.25),
    (2, 128): Tile(128, 128, 2, 1.25),
    (1, 8): Tile(32, 128, 3, 3.5),
    (1, 16): Tile(64, 128, 3, 1.9),
    (1, 32): Tile(64, 128, 3, 1.9),
    (1, 64): Tile(64, 128, 4, 1.9),
    (1, 128): Tile(128, 128, 4, 0.7),
}
"""Of so many codes a byte and tokens a program. Up to 8 tokens each warp multiplies for itself. More tokens want more
rows, since each program reads all of x. Where the last has registers for one program to a processor, it has the more
loads under way.
"""
EXACT = Tile(64, 64, 2, 2.75)
"""In float32, which is for checks: no tensor cores, and few tokens, of which one thread holds much."""


@lru_cache(maxsize=1024)
def matrix(
    tokens: int, outputs: int, width: int, group: int, per: int, itemsize: int = 2, room: int = ROOM
) -> tuple[Shape, int]:
    """For several tokens, and the tokens of a program; splits where there are few programs.

    `room`: bytes of shared memory that a program may have, of which loads under way take their part.
    """
    size = next((size for size in (8, 16, 32, 64) if tokens <= size), 128)
    rows, most, stages, wanted = TILES[per, size]
    if itemsize == 4:
        size = min(max(size, 16), 32)
        rows, most, stages, wanted = EXACT
    columns = most if group in GROUPS and group < width else _covering(width, most, least=64)
    stages = max(1, min(stages, 1 + room // (columns * (rows // per + size * itemsize))))
    programs = -(-outputs // rows) * -(-tokens // size)
    splits = _splits(programs, width // max(512, 2 * columns), least=int(PROCESSORS * wanted))
    return Shape(rows, columns, warps=rows // 16, stages=stages, splits=splits), size


WARPGROUPS = {
    (2, 64): Tile(64, 256, 2, 1.4),
    (2, 128): Tile(64, 128, 3, 1.4),
    (1, 64): Tile(64, 128, 3, 1.9),
    (1, 128): Tile(64, 64, 4, 1.4),
}
"""The same for warp groups (packed_warpgroup.py): two programs or three to a processor, of which one takes codes apart
while another multiplies."""
TALL = {
    (2, 64): Tile(128, 128, 3, 1.5),
    (2, 128): Tile(128, 128, 2, 1.5),
    (1, 64): Tile(128, 128, 3, 1.5),
    (1, 128): Tile(128, 64, 4, 1.5),
}
"""Twice the rows, which read x half as often: for weights that have enough of them without splits."""
LEAST = 33
"""Tokens from which warp groups are better."""


@lru_cache(maxsize=1024)
def warpgroup(tokens: int, outputs: int, width: int, per: int) -> tuple[Shape, int] | None:
    """For several tokens on a Hopper GPU, and the tokens of a program; None: fewer, or no tile divides the width."""
    size = 64 if tokens <= 64 else 128
    tiles = -(-tokens // size)
    tall = TALL[per, size]
    enough = -(-outputs // tall.rows) * tiles >= PROCESSORS * tall.wanted
    rows, columns, stages, wanted = tall if enough else WARPGROUPS[per, size]
    if tokens < LEAST or width % columns:
        return None
    splits = _splits(-(-outputs // rows) * tiles, width // max(512, 2 * columns), least=int(PROCESSORS * wanted))
    return Shape(rows, columns, warps=4, stages=stages, splits=splits), size


def _splits(programs: int, most: int, least: int) -> int:
    """The fewest that give so many programs and leave few processors idle."""
    useful = [splits for splits in (1, 2, 4, 8) if splits <= max(most, 1)]
    good = (each for each in useful if programs * each >= least and evenness(programs * each) >= 0.7)
    return next(good, max(useful))


def _covering(width: int, most: int, least: int) -> int:
    """The greatest power of two up to `most` that divides the width, or else one that leaves little over."""
    divisor = min(width & -width, most)
    return divisor if divisor >= most // 4 else max(least, min(most, 1 << (width - 1).bit_length()))
