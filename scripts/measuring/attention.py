"""Paged decode attention alone: bytes a second over caches too large for the L2 cache, in one CUDA graph.

A graph holds one call for each of several layers; their caches together are far larger than any L2 cache, and blocks
lie anywhere. Where the kernels offer `read`, it is timed without the write of the new keys and values.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from backend.compute.attention import kernels
from backend.compute.attention.base import Rule
from backend.compute.attention.step import Step
from backend.compute.cache import KVCache, LayerSpec
from backend.generation.plan import Plan
from measuring.ceilings import seconds
from measuring.schedules import Play, decodes

CASES = ((1, 8192), (32, 1024), (256, 1024))
"""Batch and context."""
BLOCK_SIZE = 16
LONGEST = 8192
LEAST_BYTES = 2 << 30


@dataclass(frozen=True)
class Heads:
    """Of Llama-3.1-8B."""

    query: int = 32
    kv: int = 8
    dim: int = 128


@dataclass(frozen=True)
class Measured:
    """One case."""

    batch: int
    context: int
    call: str
    """What was timed."""
    seconds: float
    bytes: int
    """Keys and values read."""

    @property
    def bandwidth(self) -> float:
        return self.bytes / self.seconds


def measure(batch: int, context: int, heads: Heads | None = None, dtype: torch.dtype = torch.bfloat16) -> Measured:
    """Seconds of one layer's call, the mean over layers of a replayed graph."""
    heads = heads or Heads()
    layer_bytes = batch * context * 2 * heads.kv * heads.dim * dtype.itemsize
    layers = max(4, -(-LEAST_BYTES // layer_bytes))
    name, call = prepared(batch, context, layers, heads, dtype, torch.device("cuda"))
    graph = captured(lambda: [call(layer) for layer in range(layers)])
    taken = seconds(graph.replay, times=10, warm=2) / layers
    return Measured(batch, context, name, taken, layer_bytes)


def prepared(
    batch: int, context: int, layers: int, heads: Heads, dtype: torch.dtype, device: torch.device
) -> tuple[str, Callable[[int], Tensor]]:
    """What is timed, and the function of a layer's number that does it."""
    blocks = batch * (context // BLOCK_SIZE + 2)
    cache = KVCache([LayerSpec(heads.kv, heads.dim)] * layers, blocks, BLOCK_SIZE, dtype, device)
    for layer in cache.layers:
        layer.normal_()
    return _call(Step.from_plan(plan(batch, context, blocks), device, cache), heads)


def plan(batch: int, context: int, blocks: int) -> Plan:
    """A decode step in which every sequence has `context` tokens, its table as wide as an engine's graphs have it."""
    play = Play(blocks, BLOCK_SIZE, batch, batch, vocab=1000)
    made: Plan = pickle.loads(decodes(play, batch, context, 1)[0].plan)  # noqa: S301 (our own)
    assert (np.abs(made.kv_lengths - context) <= 1).all()
    missing = max(0, LONGEST // BLOCK_SIZE - made.block_tables.shape[1])
    return replace(made, block_tables=np.pad(made.block_tables, ((0, 0), (0, missing))))


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        work()
    return graph


def _call(step: Step, heads: Heads) -> tuple[str, Callable[[int], Tensor]]:
    like, rule = step.cache.layers[0], Rule(heads.dim**-0.5)
    query = like.new_empty(len(step.kv_lengths), heads.query, heads.dim).normal_()
    if read := getattr(kernels, "read", None):
        return "read", lambda layer: read(query, layer, step, rule)
    new = like.new_empty(heads.kv, len(step.kv_lengths), heads.dim).normal_()
    return "attend", lambda layer: step.attend(layer, query.transpose(0, 1), new, new, rule)
