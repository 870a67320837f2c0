"""Which programs are best for packed weights' products: candidates timed one after the other, the best ones told.

Kernels are compiled by several processes beforehand, from weights of few rows: that is most of a sweep's time.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context

import torch
from torch import Tensor

from backend.compute.dense import packed, packed_shape
from backend.compute.dense.shape import Shape
from backend.compute.quantized.packed import Packed, Scheme
from measuring.packed import Product, packed_weights, random_packed, time_of

COMPILERS = 12
MATRICES = 16
"""Candidates for several tokens: three batches of four products then take about a minute."""
Candidate = tuple[str, Shape, int]
"""Which kernel, its shape and the tokens of a program."""


def candidates(product: Product, scheme: Scheme, tokens: int, limit: int) -> list[Candidate]:
    """So many of them, always the same; for several tokens those with about as many programs as the rule's."""
    made = list(_vectors() if tokens == 1 else _matrices(tokens, scheme.bits))
    if tokens > 8 and packed.warpgroups_multiply(torch.device("cuda")):
        made += _warpgroups(tokens, scheme.bits)
    random.Random(0).shuffle(made)
    if tokens > 1:
        wanted = _programs(ruled(product, scheme, tokens)[1], product)
        made.sort(key=lambda each: not 0.45 < _programs(each[1], product) / wanted < 2.2)
        limit = min(limit, MATRICES)
    return made[:limit]


def _programs(shape: Shape, product: Product) -> int:
    return -(-product.outputs // shape.rows) * shape.splits


def _vectors() -> Iterator[Candidate]:
    """A thread takes four words of each of some rows, straight to registers or ahead by way of shared memory."""
    for rows, warps, stages in itertools.product((2, 4, 8, 16), (1, 2, 4, 8), (1, 2, 3, 4)):
        yield "vector", Shape(rows, 128 * warps, warps, stages), 1


def _matrices(tokens: int, bits: int) -> Iterator[Candidate]:
    """Rows and warps, columns and stages that let two programs or more be on a processor, times splits."""
    size = next((size for size in (8, 16, 32, 64) if tokens <= size), 128)
    heights = ((64, 4), (128, 8)) if size < 128 else ((128, 8), (64, 4), (256, 8))
    heights = ((16, 1), (32, 1), (32, 2), (64, 2), *heights) if size <= 16 else heights
    columns = {8: (128, 256, 512), 16: (128, 256, 512), 32: (128, 256), 64: (64, 128), 128: (64, 128)}[size]
    for (height, warps), width, stages in itertools.product(heights, columns, (2, 3, 4)):
        held = stages * width * (height * bits // 8 + 2 * size)  # bytes of shared memory
        if (12 if size == 8 else 24) << 10 <= held <= (220 if height == 256 else 110) << 10:
            for splits in (1, 2, 4, 8):
                yield "matrix", Shape(height, width, warps, stages, splits), size


def _warpgroups(tokens: int, bits: int) -> Iterator[Candidate]:
    """Of which two or more are on a processor."""
    size = next((size for size in (16, 32, 64) if tokens <= size), 128)
    for height, width, stages in itertools.product((64, 128), (64, 128, 256), (2, 3, 4, 5)):
        if 24 << 10 <= stages * width * (height * bits // 8 + 2 * size) <= 113 << 10:
            for splits in (1, 2, 4, 8):
                yield "warpgroup", Shape(height, width, 4, stages, splits), size


def sweep(product: Product, scheme: Scheme, tokens: int, limit: int, budget: float) -> list[tuple[float, Candidate]]:
    """Seconds and candidates, the best first; the rule's choice is among them. Stops when the budget is spent."""
    device = torch.device("cuda")
    tried = [ruled(product, scheme, tokens), *candidates(product, scheme, tokens, limit)]
    _compile(product, scheme, tokens, tried)
    weights, found, end = packed_weights(scheme, product, device), [], time.monotonic() + budget
    x = torch.randn(tokens, product.width, dtype=torch.bfloat16, device=device)
    for candidate in tried:
        try:
            found.append((time_of(lambda weight: run(candidate, x, weight, product.activation), weights), candidate))  # noqa: B023
        except Exception as error:  # too much shared memory: not a candidate
            print(f"  {candidate}: {type(error).__name__}", flush=True)
        if time.monotonic() > end:
            break
    if found:
        _tell(f"{scheme.kind} {product.name}, {tokens} tokens", found)
    return sorted(found)


def _tell(case: str, found: list[tuple[float, Candidate]]) -> None:
    """The rule's choice, which was tried first, and the best three."""
    print(f"{case}: {found[0][0] * 1e6:.1f} µs by the rule {_told(found[0][1])}; best of {len(found)}:", flush=True)
    for taken, candidate in sorted(found)[:3]:
        print(f"  {taken * 1e6:7.1f} µs {_told(candidate)}", flush=True)


def _told(candidate: Candidate) -> str:
    way, (rows, columns, warps, stages, splits), size = candidate
    return f"{way} {rows}x{columns} warps {warps} stages {stages} splits {splits} tokens {size}"


def ruled(product: Product, scheme: Scheme, tokens: int) -> Candidate:
    """What packed.py takes."""
    per, group = 8 // scheme.bits, scheme.columns(product.width)
    if tokens == 1:
        outputs = product.outputs // 2 if product.activation else product.outputs
        return "vector", packed_shape.vector(outputs, product.width, bool(product.activation), per), 1
    cut = packed_shape.warpgroup(tokens, product.outputs, product.width, per)
    if cut and packed.warpgroups_multiply(torch.device("cuda")):
        return "warpgroup", *cut
    return "matrix", *packed_shape.matrix(tokens, product.outputs, product.width, group, per)


def run(candidate: Candidate, x: Tensor, weight: Packed, activation: str | None) -> Tensor:
    """A gate is the vector kernel's business alone."""
    way, shape, size = candidate
    if way == "vector":
        return packed.by_vector(shape, x, weight, None, None, None, activation)
    return packed.by_matrix(shape, size, x, weight, None, None, warpgroups=way == "warpgroup")


def _compile(product: Product, scheme: Scheme, tokens: int, tried: list[Candidate]) -> None:
    shares = [tried[index::COMPILERS] for index in range(COMPILERS)]
    list(_pool().map(_compiled, itertools.repeat((product, scheme, tokens)), shares))


@cache
def _pool() -> ProcessPoolExecutor:
    """One for all cases: each process takes seconds to begin."""
    return ProcessPoolExecutor(COMPILERS, get_context("spawn"))


def _compiled(case: tuple[Product, Scheme, int], tried: list[Candidate]) -> None:
    product, scheme, tokens = case
    device = torch.device("cuda")
    weight = random_packed(scheme, 256, product.width, device)
    x = torch.randn(tokens, product.width, dtype=torch.bfloat16, device=device)
    for candidate in tried:
        try:
            run(candidate, x, weight, product.activation)
        except Exception:  # noqa: S112 (told when it is timed)
            continue
    torch.cuda.synchronize()
