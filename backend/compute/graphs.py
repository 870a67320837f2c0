"""CUDA graphs of whole decode steps: one copy in, one launch or two, tokens out. It does not know how they are chosen.

A graph replays the same kernels on the same tensors, so a step's values are copied into them first, all in one piece; a
step of fewer sequences than the graph was captured for is padded with rows that attend to nothing and write to the
scratch block and the spare slot. One graph gives logits and the most likely tokens; a small second one, replayed after
it where a row asks for it, draws them. Where a request asks for more, the logits are there for the sampler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backend.compute.attention.base import kernel
from backend.compute.attention.step import Step
from backend.compute.cache import KVCache
from backend.compute.capture import capturing
from backend.compute.sampling.parameters import WORDS, lay_out
from backend.compute.upload import refill
from backend.generation.plan import Plan

Made = TypeVar("Made")


class Decode(Protocol):
    """The two halves of a step; S rows, integers int64 [S] but for the words."""

    def forward(self, ids: Tensor, positions: Tensor, slots: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Logits [S, vocabulary] and the most likely tokens, int32 [S], noted for the next step."""

    def draw(self, logits: Tensor, words: Tensor, slots: Tensor) -> Tensor:
        """Drawn tokens, int32 [S], noted for the next step; words [S, WORDS] are sampling.parameters'."""


def sizes(most: int) -> list[int]:
    """Numbers of sequences to capture: 1, 2, 4, 8, then every 8 to 64, every 16 to 256, every 64 beyond, and `most`."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most + 1, 64)]
    return [*(size for size in steps if size < most), most]


class Inputs:
    """The integers of a decode step of `size` sequences, with tables of `width` blocks, in one piece of memory."""

    def __init__(self, cache: KVCache, size: int, width: int, spare_slot: int) -> None:
        self._size, self._width, self._padding = size, width, [[cache.scratch_slot], [0], [0], [spare_slot]]
        packed = np.zeros(size * (9 + WORDS + width), np.int32)
        self._lay_out(packed, None)
        self._packed = torch.from_numpy(packed).to(cache.device)
        longs, lengths, self.words, tables = _views(self._packed, size, width)
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
        refill(self._packed, lambda packed: self._lay_out(packed, plan))

    def _lay_out(self, packed: NDArray[np.int32], plan: Plan | None) -> None:
        longs, lengths, words, tables = _views(packed, self._size, self._width)
        rows = longs.view(np.int64).reshape(4, self._size)
        count = 0 if plan is None else len(plan.slots)
        rows[:, count:], lengths[count:], tables[count:, :1] = self._padding, 0, 0
        if plan is not None:
            rows[:, :count] = plan.kv_slots, plan.input_ids, plan.positions, plan.slots
            lengths[:count] = plan.kv_lengths
            tables[:count, : plan.block_tables.shape[1]] = plan.block_tables  # what lies beyond is not read
            if not plan.sampling.greedy:
                lay_out(words, plan.sampling)


def _views(packed: Any, size: int, width: int) -> tuple[Any, Any, Any, Any]:
    """Four rows of 64-bit words (KV slots, ids, positions, slots), lengths, how rows are drawn, block tables."""
    longs, lengths, words = 8 * size, 9 * size, (9 + WORDS) * size
    tables = packed[words:].reshape(size, width)
    return packed[:longs], packed[longs:lengths], packed[lengths:words].reshape(size, WORDS), tables


class DecodeGraph:
    """A decode step, captured once. Graphs may share the memory `pool`, since no two of them run at the same time."""

    def __init__(self, decode: Decode, inputs: Inputs, pool: Any) -> None:
        self._inputs = inputs
        self._graph, (self._logits, self._tokens) = captured(
            lambda: decode.forward(inputs.ids, inputs.positions, inputs.slots, inputs.step), pool
        )
        self._draw, self._drawn = captured(lambda: decode.draw(self._logits, inputs.words, inputs.slots), pool)

    def replay(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """Logits [R, vocabulary] and tokens [R] of a decode plan, valid until the next replay.

        The tokens are the most likely ones, or drawn where a row asks for that; penalties and the like are not in them.
        """
        count = len(plan.rows)
        self._inputs.fill(plan)
        self._graph.replay()
        if plan.sampling.greedy or not plan.sampling.plain:
            return self._logits[:count], self._tokens[:count]
        self._draw.replay()
        return self._logits[:count], self._drawn[:count]


def captured(compute: Callable[[], Made], pool: Any) -> tuple[torch.cuda.CUDAGraph, Made]:
    """A graph of what `compute` launches, and its result, which each replay computes anew."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels compile and libraries allocate before the capture
        for _ in range(2):
            compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with capturing(graph, pool):
        made = compute()
    return graph, made
