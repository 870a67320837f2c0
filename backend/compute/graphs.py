"""CUDA graphs of the model's forward for decode steps. It does not know sampling: its output is logits.

A graph replays the same kernels on the same tensors, so a step's values are copied into them first; a step of fewer
sequences than the graph was captured for is padded with rows that attend to nothing and write to the scratch block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from backend.compute.attention.step import Step
from backend.compute.cache import KVCache
from backend.compute.upload import staged
from backend.generation.plan import Plan

Forward = Callable[[Tensor, Tensor, Step, int], Tensor]


def sizes(most: int) -> list[int]:
    """Numbers of sequences to capture: 1, 2, 4, 8, then every 8 to 64, every 16 to 256, every 64 beyond, and `most`."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most + 1, 64)]
    return [*(size for size in steps if size < most), most]


class DecodeGraph:
    """The forward of `size` sequences with block tables of `width` blocks, captured once.

    Graphs may share the memory `pool`, since no two of them run at the same time.
    """

    def __init__(self, forward: Forward, size: int, width: int, cache: KVCache, pool: Any) -> None:
        device = cache.device
        self._ids = torch.zeros(size, dtype=torch.int64, device=device)
        self._positions = torch.zeros(size, dtype=torch.int64, device=device)
        self._step = Step.static(cache, size, width)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels compile and libraries allocate before the capture
            for _ in range(2):
                forward(self._ids, self._positions, self._step, 0)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._logits = forward(self._ids, self._positions, self._step, 0)

    def replay(self, plan: Plan, ids: Tensor) -> Tensor:
        """Logits [R, vocabulary] of a decode plan of at most `size` sequences, valid until the next replay."""
        count = len(plan.rows)
        self._ids[:count].copy_(ids)
        self._positions[:count].copy_(staged(plan.positions, self._positions.device), non_blocking=True)
        self._step.fill(plan)
        self._graph.replay()
        return self._logits[:count]
