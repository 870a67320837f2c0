"""CUDA graphs of a stack of layers over packed tokens: one launch in place of some hundred. It knows no model.

A graph holds for one bucket: micro-batches are filled up to it with tokens of sequences that nobody asks for. Weights
aside, all that a graph reads lies in tensors that all graphs share, since no two of them run at the same time.
"""

from __future__ import annotations

import gc
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from backend.compute.capture import capturing
from backend.compute.encoders.attention import Spread
from backend.compute.encoders.buckets import Bucket
from backend.errors import one_line
from backend.tasks.text import stepped

MOST = 256
"""Graphs that are kept."""
SEEN = 512
"""Buckets met once that are remembered."""
MEMORY = 4 << 30
"""Bytes of device memory after which no more are captured."""

Stack = Callable[[list[Any], list[Tensor], Spread], Tensor]
"""Calls, values [1, tokens, ...] and where sequences lie -> hidden [1, tokens, hidden]."""
Fill = Callable[[list[Tensor]], None]
Replay = Callable[[], None]

log = logging.getLogger(__name__)


class StackGraphs:
    """Graphs of one stack. The first micro-batch of a bucket is left to the caller, the second one captured.

    `capture` makes a function that repeats what its argument launches; `agree` says whether all ranks succeeded.
    """

    def __init__(
        self,
        stack: Stack,
        most: int,
        capture: Callable[[Callable[[], None]], Replay],
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        """For micro-batches of `most` tokens, filled up, at most."""
        self._stack, self._most, self._capture, self._agree = stack, stepped(most), capture, agree
        self._graphs: OrderedDict[Bucket, Replay] = OrderedDict()
        self._seen: OrderedDict[Bucket, None] = OrderedDict()
        self._calls: list[Any] = []
        self._values: list[Tensor] = []  # [1, most, ...] each
        self.failed = ""
        """Why nothing more is captured, if so."""

    @property
    def count(self) -> int:
        return len(self._graphs)

    def run(self, bucket: Bucket, calls: list[Any], like: list[Tensor], starts: Tensor, fill: Fill) -> Tensor | None:
        """The stack's answer, valid until the next run; nothing where the caller is to compute it.

        `like` are tensors [.., .., ...] whose last dimensions and dtypes are the values'; `fill` writes the values.
        # starts [sequences + 1] -> [1, bucket's tokens, hidden]
        """
        replay = self._graphs.get(bucket)
        if not self._fits(bucket, calls) or (replay is None and not self._again(bucket)):
            return None
        self._allocate(like, starts.device)
        values = [value[:, : bucket.tokens] for value in self._values]
        fill(values)
        self._starts[: bucket.sequences + 1].copy_(starts)
        if replay is None:
            self._add(bucket, values)
        else:
            self._graphs.move_to_end(bucket)
            replay()
        return values[0]

    def prepare(self, buckets: Iterable[Bucket]) -> None:
        """Capture these; a micro-batch must have been run before."""
        for bucket in buckets:
            if bucket in self._graphs or bucket.tokens > self._most or self.failed or not self._values:
                continue
            starts = bucket.starts(np.array([min(bucket.longest, bucket.tokens)]))
            self._starts[: len(starts)].copy_(torch.from_numpy(starts))
            self._add(bucket, [value[:, : bucket.tokens] for value in self._values])

    def _fits(self, bucket: Bucket, calls: list[Any]) -> bool:
        """Whether a graph would compute these calls; one holds what they hold beside values."""
        self._calls = self._calls or calls
        return bucket.tokens <= self._most and calls == self._calls

    def _again(self, bucket: Bucket) -> bool:
        """Whether it is time to capture this bucket."""
        if bucket in self._seen:
            return not self.failed
        self._seen[bucket] = None
        if len(self._seen) > SEEN:
            self._seen.popitem(last=False)
        return False

    def _allocate(self, like: list[Tensor], device: torch.device) -> None:
        """What graphs read, once for all of them."""
        if not self._values:
            self._values = [each.new_zeros(1, self._most, *each.shape[2:]) for each in like]
            self._starts = torch.zeros(2 * self._most + 1, dtype=torch.int32, device=device)

    def _add(self, bucket: Bucket, values: list[Tensor]) -> None:
        """Compute, so that all kernels are there, and capture the same."""
        spread = Spread(self._starts[: bucket.sequences + 1], bucket.longest)

        def compute() -> None:
            values[0].copy_(self._stack(self._calls, values, spread))

        compute()
        replay, reason = self._captured(compute)
        if not self._agree(replay is not None) or replay is None:
            self.failed = reason or "another rank could not"
            log.warning("no more CUDA graphs of layers are captured: %s", self.failed)
            return
        self._graphs[bucket] = replay
        if len(self._graphs) > MOST:
            self._graphs.popitem(last=False)

    def _captured(self, compute: Callable[[], None]) -> tuple[Replay | None, str]:
        """The graph, or why there is none."""
        try:
            return self._capture(compute), ""
        except RuntimeError as error:
            return None, one_line(error)


class Capture:
    """Captures on CUDA, all graphs in one pool of memory. While it does, other threads may wait for the device."""

    def __init__(self) -> None:
        self._pool, self._stream, self._bytes = torch.cuda.graph_pool_handle(), torch.cuda.Stream(), 0

    def __call__(self, compute: Callable[[], None]) -> Replay:
        """The graph's replay; RuntimeError where the memory for graphs is used up."""
        if self._bytes > MEMORY:
            raise RuntimeError(f"those there take {self._bytes >> 20} MiB")
        before, graph = _free(), torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with _no_collection(), capturing(graph, self._pool, self._stream, "thread_local"):
            compute()
        self._bytes += max(0, before - _free())
        return graph.replay


def _free() -> int:
    """Bytes of the device's memory, as the driver sees it: it keeps the graphs themselves."""
    return torch.cuda.mem_get_info()[0]


@contextmanager
def _no_collection() -> Iterator[None]:
    """Freeing what others left could be an operation that a capture forbids."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
