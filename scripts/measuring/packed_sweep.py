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
Candidate = tuple[Shape, int]
"""And the tokens of a program; 0: the kernel for one token."""


def candidates(tokens: int, limit: int) -> list[Candidate]:
    """So many of them, always the same."""
    made = list(_vectors() if tokens == 1 else _matrices(tokens))
    random.Random(0).shuffle(made)
    return made[:limit]


def _vectors() -> Iterator[Candidate]:
    for rows, words, warps in itertools.product((2, 4, 8, 16), (64, 128, 256, 512), (1, 2, 4, 8)):
        if 2 <= words // (32 * warps) * rows <= 32:
            yield Shape(rows, words, warps, 1), 0


def _matrices(tokens: int) -> Iterator[Candidate]:
    covering = next((size for size in (16, 32, 64) if tokens <= size), 128)
    sizes = {covering, min(covering, 64)} if tokens > 64 else {covering}
    rows = ((64, 4), (128, 4), (128, 8))
    for (height, warps), columns, stages, splits, size in itertools.product(
        rows, (64, 128, 256), (2, 3, 4, 5), (1, 2, 4, 8), sorted(sizes)
    ):
        if stages * columns * (height + 2 * size) <= 200 << 10:  # bytes of shared memory, at one a code
            yield Shape(height, columns, warps, stages, splits), size


def sweep(product: Product, scheme: Scheme, tokens: int, limit: int, budget: float) -> list[tuple[float, Candidate]]:
    """Seconds and candidates, the best first; the rule's choice is among them. Stops when the budget is spent."""
    device = torch.device("cuda")
    tried = [ruled(product, scheme, tokens), *candidates(tokens, limit)]
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
    return sorted(found)


def ruled(product: Product, scheme: Scheme, tokens: int) -> Candidate:
    """What packed_shape says."""
    per, group = 8 // scheme.bits, scheme.columns(product.width)
    if tokens > 1:
        return packed_shape.matrix(tokens, product.outputs, product.width, group, per)
    outputs = product.outputs // 2 if product.activation else product.outputs
    return packed_shape.vector(outputs, product.width, bool(product.activation), per), 0


def run(candidate: Candidate, x: Tensor, weight: Packed, activation: str | None) -> Tensor:
    """A gate is the vector kernel's business alone."""
    shape, size = candidate
    if size == 0:
        return packed.by_vector(shape, x, weight, None, None, None, activation)
    return packed.by_matrix(shape, size, x, weight, None, None)


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
