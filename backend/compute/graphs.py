"""CUDA graphs of whole decode steps: one copy in, one launch, tokens out. It does not know how tokens are drawn.

A graph replays the same kernels on the same tensors, so a step's values are copied into them first, all in one piece; a
step of fewer sequences than the graph was captured for is padded with rows that attend to nothing and write to the
scratch block and the spare slot. The graph takes the most likely tokens; where a request asks for other ones, its
logits are there for the sampler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backend.compute.attention.base import kernel
from backend.compute.attention.step import Step
from backend.compute.cache import KVCache
from backend.generation.plan import Plan

Forward = Callable[[Tensor, Tensor, Tensor, Step], tuple[Tensor, Tensor]]
"""Ids, positions, slots of the state, all int64 [S], and the step -> logits [S, vocabulary], int32 tokens [S]."""


def sizes(most: int) -> list[int]:
    """Numbers of sequences to capture: 1, 2, 4, 8, then every 8 to 64, every 16 to 256, every 64 beyond, and `most`."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most + 1, 64)]
    return [*(size for size in steps if size < most), most]


class Inputs:
    """The integers of a decode step of `size` sequences, with tables of `width` blocks, in one piece of memory."""

    def __init__(self, cache: KVCache, size: int, width: int, spare_slot: int) -> None:
        self._size, self._width, self._padding = size, width, [[cache.scratch_slot], [0], [0], [spare_slot]]
        packed = np.zeros(size * (9 + width), np.int32)
        self._lay_out(packed, None)
        self._packed = torch.from_numpy(packed).to(cache.device)
        longs, lengths, tables = _views(self._packed, size, width)
        kv_slots, self.ids, self.positions, self.slots = longs.view(torch.int64).view(4, size).unbind()
        starts = np.arange(size + 1, dtype=np.int32)
        self.step = Step(
            cache=cache,
            kv_slots=kv_slots,
            query_starts=torch.from_numpy(starts).to(cache.device),
            kv_lengths=lengths,
            block_tables=tables,
            decode=True,
            host_starts=starts,
            host_lengths=np.zeros(size, np.int32),
            kernel=kernel(cache.device.type),
        )

    def fill(self, plan: Plan) -> None:
        """Copy a decode plan of at most `size` sequences; nothing waits for it, here or on the device."""
        host = torch.empty(self._packed.shape, dtype=torch.int32, pin_memory=self._packed.device.type == "cuda")
        self._lay_out(host.numpy(), plan)
        self._packed.copy_(host, non_blocking=True)

    def _lay_out(self, packed: NDArray[np.int32], plan: Plan | None) -> None:
        longs, lengths, tables = _views(packed, self._size, self._width)
        rows = longs.view(np.int64).reshape(4, self._size)
        count = 0 if plan is None else len(plan.slots)
        rows[:, count:], lengths[count:], tables[count:, :1] = self._padding, 0, 0
        if plan is not None:
            rows[:, :count] = plan.kv_slots, plan.input_ids, plan.positions, plan.slots
            lengths[:count] = plan.kv_lengths
            tables[:count, : plan.block_tables.shape[1]] = plan.block_tables  # what lies beyond is not read


def _views(packed: Any, size: int, width: int) -> tuple[Any, Any, Any]:
    """Four rows of 64-bit words (KV slots, ids, positions, slots), lengths, block tables."""
    return packed[: 8 * size], packed[8 * size : 9 * size], packed[9 * size :].reshape(size, width)


class DecodeGraph:
    """A decode step, captured once. Graphs may share the memory `pool`, since no two of them run at the same time."""

    def __init__(self, forward: Forward, inputs: Inputs, pool: Any) -> None:
        self._inputs = inputs
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels compile and libraries allocate before the capture
            for _ in range(2):
                forward(inputs.ids, inputs.positions, inputs.slots, inputs.step)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._logits, self._tokens = forward(inputs.ids, inputs.positions, inputs.slots, inputs.step)

    def replay(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """Logits [R, vocabulary] and the most likely tokens [R] of a decode plan, valid until the next replay."""
        count = len(plan.rows)
        self._inputs.fill(plan)
        self._graph.replay()
        return self._logits[:count], self._tokens[:count]
