"""CUDA graphs of steps that hold prompts, in pieces between attention calls; a step of decodes alone is graphs.py's.

What lies between two attention calls depends on how many tokens there are and on nothing else, so it is captured;
attention, whose launches depend on each chunk's length, is called as usual between the pieces. Some 10 launches from
Python a layer become two, and a step of few tokens takes as long as the device needs, not as the host does.

The model runs once while it is captured, and does not know: the attention kernel that its step brings ends a piece and
begins the next. Tensors on their way to and from attention lie in places that all graphs share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backend.compute.attention.base import Rule
from backend.compute.attention.step import Step
from backend.compute.cache import KVCache
from backend.compute.capture import capturing, side
from backend.compute.upload import refill
from backend.generation.plan import Plan

Attention = Callable[[Step, Tensor], object]
"""One layer's attention of a step's own tokens, by its own kernel, into a place [tokens, heads, dim]."""
Between = Callable[[Attention, Tensor], None]
"""Is told what belongs between two pieces, and where its result is expected."""
Forward = Callable[[Tensor, Tensor, Tensor, Step, Tensor], Tensor]
"""Ids, positions and slots [T], a step and which tokens' logits [R] -> logits [R, vocabulary]."""

FINE, DENSE = 1024, 64
"""Up to so many tokens one graph every DENSE; beyond, where the device is the slower, one of the whole budget."""

TIMED = 3
"""Replays of which the fastest is how long a graph takes."""
WORTH = 0.05
"""Share of its time for which another graph is taken: less is noise, and the next start might choose otherwise, whose
results are rounded otherwise."""


def sizes(budget: int) -> list[int]:
    """Numbers of tokens to capture."""
    return sorted({*range(DENSE, min(FINE, budget) + 1, DENSE), budget})


def covering(captured: Iterable[int], tokens: int) -> int:
    """The size, of those captured, that computes so many tokens without much waste; 0: none does."""
    return min((size for size in captured if tokens <= size < tokens + DENSE), default=0)


def soonest(seconds: dict[int, float]) -> dict[int, int]:
    """For each size the one to compute it by: itself, or a larger one that takes WORTH less time.

    Libraries choose programs by the number of tokens, and not always well: cuBLAS 13 multiplies 448 tokens by an 8B
    model's layers in 13.8 ms on an H200, 512 in 11.5.
    """

    def best(size: int) -> int:
        found = min((other for other in seconds if other >= size), key=seconds.__getitem__)
        return found if seconds[found] < (1 - WORTH) * seconds[size] else size

    return {size: best(size) for size in seconds}


class Inputs:
    """The integers of a step of up to `tokens` tokens and `rows` logits, in one piece of memory."""

    def __init__(self, cache: KVCache, tokens: int, rows: int, spare_slot: int) -> None:
        self._tokens, self._padding = tokens, np.array([[cache.scratch_slot], [0], [0], [spare_slot]])
        self._packed = torch.zeros(4 * tokens + rows, dtype=torch.int64, device=cache.device)
        self.kv_slots, self.ids, self.positions, self.slots = self._packed[: 4 * tokens].view(4, tokens).unbind()
        self.ends = self._packed[4 * tokens :]

    def fill(self, plan: Plan) -> None:
        """Copy a plan of at most so many tokens and rows; nothing waits for it, here or on the device."""
        refill(self._packed, lambda packed: self._lay_out(packed, plan))

    def _lay_out(self, packed: NDArray[np.int64], plan: Plan) -> None:
        rows, ends, count = packed[: 4 * self._tokens].reshape(4, -1), packed[4 * self._tokens :], len(plan.input_ids)
        rows[:, count:], ends[len(plan.rows) :] = self._padding, 0
        rows[0, :count], rows[1, :count], rows[2, :count] = plan.kv_slots, plan.input_ids, plan.positions
        rows[3, :count] = np.repeat(plan.slots, np.diff(plan.query_starts))
        ends[: len(plan.rows)] = plan.query_starts[1:][plan.rows] - 1


class Places:
    """Memory for what goes into and comes out of attention, and for logits; all graphs of a model share it."""

    def __init__(self) -> None:
        self._places: dict[tuple[Any, ...], Tensor] = {}

    def of(self, name: str, like: Tensor) -> Tensor:
        """For a tensor of this shape; the first of a name has the most rows, and is made of zeros."""
        key = (name, like.shape[1:], like.dtype)
        if key not in self._places:
            self._places[key] = torch.zeros_like(like, memory_format=torch.contiguous_format)
        assert len(like) <= len(self._places[key])
        return self._places[key][: len(like)]

    def copied(self, name: str, given: Tensor) -> Tensor:
        """The same values, there."""
        return self.of(name, given).copy_(given)


class Cut:
    """The attention kernel of a step that is captured: computes nothing, notes what is to be called in its place."""

    def __init__(self, places: Places, between: Between) -> None:
        self._places, self._between = places, between

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layer: int, step: Step, rule: Rule) -> Tensor:
        """See base.Kernel: [heads, tokens, dim] and twice [kv heads, tokens, dim] -> [tokens, heads, dim]."""
        given = {"query": query, "key": key, "value": value}
        q, k, v = (self._places.copied(name, each.transpose(0, 1)) for name, each in given.items())

        def attention(live: Step, place: Tensor) -> None:
            query, key, value = (each[: len(place)].transpose(0, 1) for each in (q, k, v))
            place.copy_(live.attend(layer, query, key, value, rule))

        return self._noted(attention, q)

    def read(self, query: Tensor, layer: int, step: Step, rule: Rule, output: Tensor | None = None) -> Tensor:
        """See base.Kernel: [tokens, heads, dim] -> the same."""
        q = self._places.copied("query", query)
        return self._noted(lambda live, place: live.read(layer, q[: len(place)], rule, place), q)

    def _noted(self, attention: Attention, query: Tensor) -> Tensor:
        output = self._places.of("output", query)
        self._between(attention, output)
        return output


class PromptGraph:
    """A step of up to so many tokens, captured once; the largest first of those that share `places` and `pool`."""

    def __init__(self, forward: Forward, inputs: Inputs, step: Step, places: Places, pool: Any) -> None:
        """`step`: any one, for the cache that it points into."""
        self._inputs, self._pool = inputs, pool
        self._pieces: list[torch.cuda.CUDAGraph] = []
        self._calls: list[tuple[Attention, Tensor]] = []

        def compute(between: Between) -> Tensor:
            cut = replace(step, kv_slots=inputs.kv_slots, kernel=Cut(places, between), kept={})
            return places.copied("logits", forward(inputs.ids, inputs.positions, inputs.slots, cut, inputs.ends))

        stream = side(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compute(lambda attention, output: None)  # kernels compile, libraries allocate, places are made
            torch.cuda.synchronize()
            with ExitStack() as self._open:
                self._begin()
                self._logits = compute(self._cut)
        torch.cuda.current_stream().wait_stream(stream)

    def _begin(self) -> None:
        self._pieces.append(torch.cuda.CUDAGraph())
        self._open.enter_context(capturing(self._pieces[-1], self._pool, torch.cuda.current_stream()))

    def _cut(self, attention: Attention, output: Tensor) -> None:
        self._open.close()
        self._calls.append((attention, output))
        self._begin()

    def seconds(self) -> float:
        """What its pieces take on the device, without attention: the least of some times."""
        begun, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        taken: list[float] = []
        for _ in range(TIMED):
            begun.record()
            for piece in self._pieces:
                piece.replay()
            done.record()
            done.synchronize()
            taken.append(begun.elapsed_time(done) / 1e3)
        return min(taken)

    def replay(self, plan: Plan, live: Step) -> Tensor:
        """Logits [R, vocabulary] of a plan of at most so many tokens, valid until the next replay; `live`: its step."""
        self._inputs.fill(plan)
        for piece, (attention, output) in zip(self._pieces, self._calls, strict=False):  # one more piece follows
            piece.replay()
            attention(live, output[: len(plan.input_ids)])
        self._pieces[-1].replay()
        return self._logits[: len(plan.rows)]
