"""Floors: how fast a device could be at all, by its memory's bandwidth and its matrix units. Pure arithmetic.

t = max(weights / bandwidth, 2 * parameters * tokens / flops) + cached keys and values / bandwidth, and for prompts
their attention's arithmetic, on every one of the ranks that share the work.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def device_name() -> str:
    """The first GPU's, without a CUDA context in this process; empty where there is none."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(0)))
    except Exception:
        return ""


Chunk = tuple[int, int]
"""New tokens of one sequence in a step, and its length once they are computed."""


def step_seconds(
    shape: Shape, chunks: list[Chunk], limit: Ceiling, world: int = 1, itemsize: int = 2,
    layers: float | None = None, cache: int = 2,
) -> float:  # fmt: skip
    """The least time of a step in which every chunk samples one token; `layers`, `cache`: bytes of an element there."""
    tokens = sum(new for new, _ in chunks)
    stored = (itemsize if layers is None else layers) * shape.layer_parameters + itemsize * shape.head_parameters
    weights = stored / limit.bandwidth
    linear = 2 * (shape.layer_parameters * tokens + shape.head_parameters * len(chunks)) / limit.flops
    return (max(weights, linear) + _attention(shape, chunks, limit, cache)) / world


def _attention(shape: Shape, chunks: list[Chunk], limit: Ceiling, itemsize: int) -> float:
    """Reading the cache for single tokens, arithmetic for the others."""
    read = sum(length for new, length in chunks if new == 1) * shape.kv_elements * itemsize
    pairs = sum(new * (length - new) + new * new / 2 for new, length in chunks if new > 1)
    return read / limit.bandwidth + 4 * shape.layers * shape.heads * shape.head_dim * pairs / limit.flops


def workload_seconds(
    shape: Shape, lengths: Sequence[tuple[int, int]], together: int, prefix: int, limit: Ceiling, world: int = 1
) -> float:
    """The least time for (prompt, output) pairs, `together` at a time, all of whose prompts begin with the same tokens.

    The same formula over the whole: weights are read once for every token of the longest, or of `together` in turn.
    """
    outputs = [output for _, output in lengths]
    steps = max(*outputs, sum(outputs) / together)
    tokens = sum(prompt - prefix + output - 1 for prompt, output in lengths) + prefix
    weights = 2 * steps * (shape.layer_parameters + shape.head_parameters) / limit.bandwidth
    linear = 2 * (shape.layer_parameters * tokens + shape.head_parameters * sum(outputs)) / limit.flops
    prompts = [(prompt - prefix, prompt) for prompt, _ in lengths if prompt - prefix > 1]
    read = sum((output - 1) * (prompt + output / 2) for prompt, output in lengths) * shape.kv_elements * 2
    return (max(weights, linear) + read / limit.bandwidth + _attention(shape, prompts, limit, 2)) / world


def cache_seconds(tokens: int, kv_heads: int, head_dim: int, limit: Ceiling, itemsize: int = 2) -> float:
    """Reading one layer's keys and values of so many tokens."""
    return tokens * 2 * kv_heads * head_dim * itemsize / limit.bandwidth
