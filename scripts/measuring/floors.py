"""Floors: how fast a device could be at all, by its memory's bandwidth and its matrix units. Pure arithmetic.

t = max(weights / bandwidth, 2 * parameters * tokens / flops) + cached keys and values / bandwidth, and for prompts
their attention's arithmetic, on every one of the ranks that share the work.
"""

from __future__ import annotations

from dataclasses import dataclass

from measuring.shapes import Shape


@dataclass(frozen=True)
class Ceiling:
    """What one device reaches at the most."""

    bandwidth: float
    """Bytes a second."""
    flops: float
    """bf16 matrix product."""


H200 = Ceiling(4.3e12, 790e12)
H100 = Ceiling(3.0e12, 790e12)


def ceiling(device_name: str) -> Ceiling | None:
    """Of a GPU by its name; None where it is not known."""
    if "H200" in device_name:
        return H200
    return H100 if "H100" in device_name else None


Chunk = tuple[int, int]
"""New tokens of one sequence in a step, and its length once they are computed."""


def step_seconds(shape: Shape, chunks: list[Chunk], limit: Ceiling, world: int = 1, itemsize: int = 2) -> float:
    """The least time of a step in which every chunk samples one token."""
    tokens = sum(new for new, _ in chunks)
    weights = itemsize * (shape.layer_parameters + shape.head_parameters) / limit.bandwidth
    linear = 2 * (shape.layer_parameters * tokens + shape.head_parameters * len(chunks)) / limit.flops
    return (max(weights, linear) + _attention(shape, chunks, limit, itemsize)) / world


def _attention(shape: Shape, chunks: list[Chunk], limit: Ceiling, itemsize: int) -> float:
    """Reading the cache for single tokens, arithmetic for the others."""
    read = sum(length for new, length in chunks if new == 1) * shape.kv_elements * itemsize
    pairs = sum(new * (length - new) + new * new / 2 for new, length in chunks if new > 1)
    return read / limit.bandwidth + 4 * shape.layers * shape.heads * shape.head_dim * pairs / limit.flops


def decode_rate(shape: Shape, batch: int, context: int, limit: Ceiling, world: int = 1) -> float:
    """Tokens a second of `batch` sequences of `context` tokens, at the most."""
    return batch / step_seconds(shape, [(1, context)] * batch, limit, world)


def cache_seconds(tokens: int, kv_heads: int, head_dim: int, limit: Ceiling, itemsize: int = 2) -> float:
    """Reading one layer's keys and values of so many tokens."""
    return tokens * 2 * kv_heads * head_dim * itemsize / limit.bandwidth
