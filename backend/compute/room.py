"""Room: whether every rank has the device memory for a step, asked before any of them begins it. It knows no model.

The largest step runs at load and CUDA graphs allocate nothing, so what may find no memory is a step of single kernels
(a prompt, penalties, log-probabilities) on a device that another process fills, or in memory that is fragmented.

Asked before and not caught after: a rank that fails inside a step leaves the others in a collective that it never
joins, and nothing but ending the group helps then. Before the step nothing has happened yet, to the cache, to the
sampler's counts or between ranks; all agree what to leave out, and compute the rest. An allocation that fails within
the step nevertheless (the estimate was too low) is raised, and the group starts again: slower, never a wrong text.

Cost: one allocation from torch's own cache (a few µs). With several ranks also an all-reduce of one number among the
host's processes, once a step that is not a graph alone (on two cores with ten busy neighbours 1.5 ms; not measured yet
where each rank has a core). One of NCCL would have to wait for the steps under way, which run ahead. Nothing is asked
on CPU, where the kernel ends a process and no allocation fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from backend.compute.sampler import BROKEN
from backend.generation.plan import Plan, Sampled
from backend.ranks.rank import Deferred

SPARE = 64 << 20
"""Bytes asked for beyond what was measured: torch rounds up, and keeps small tensors apart from large ones."""


class Room:
    """One rank's view; every rank of a group makes one at the same time, and asks at the same steps."""

    def __init__(self, device: torch.device, world: int) -> None:
        self.counted = device.type == "cuda"
        self.per_token = self.per_row = 0.0
        """Bytes that a step takes for a moment, for each token and more for each sampled one."""
        self._device, self._world = device, world
        self._hosts: Any = distributed.new_group(backend="gloo") if self.counted and world > 1 else None

    def peak(self, compute: Callable[[], object]) -> int:
        """Bytes that this takes for a moment, beside what stays; 0 on CPU."""
        if self._device.type != "cuda":
            compute()
            return 0
        torch.cuda.reset_peak_memory_stats(self._device)
        compute()
        return torch.cuda.max_memory_allocated(self._device) - torch.cuda.memory_allocated(self._device)

    def bytes(self, tokens: int, rows: int) -> int:
        """For a step, as estimated; never 0."""
        return SPARE + int(tokens * self.per_token + rows * self.per_row)

    def hold(self, count: int) -> None:
        """Take so many bytes from the driver into torch's cache, before another process does, if they are there."""
        if self.counted:
            self._has(count)

    def fits(self, count: int) -> bool:
        """Whether all ranks have so many bytes: each asks for its own."""
        return not self.counted or self._agreed(self._has(count))

    def keep(self, plan: Plan, needs: Callable[[Plan], int]) -> tuple[Plan, list[int]]:
        """The plan without the chunks that there is no memory for, and which those are: the longest first, the last of
        them before others. `needs`: bytes for a plan, 0 where it allocates nothing, on all ranks alike.
        """
        left, lost = [*range(len(plan.slots))], []
        while self.counted and left and (count := needs(plan)) and not self.fits(count):
            lengths = np.diff(plan.query_starts)
            at = len(lengths) - 1 - int(lengths[::-1].argmax())
            plan = plan.without(at)
            lost.append(left.pop(at))
        return plan, sorted(lost)

    def _has(self, count: int) -> bool:
        """In one piece; torch gives back what it caches and tries again before it says no."""
        try:
            torch.empty(count, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError:
            return False
        return True

    def _agreed(self, has: bool) -> bool:
        if self._world == 1:
            return has
        every = torch.tensor(int(has))
        distributed.all_reduce(every, op=distributed.ReduceOp.MIN, group=self._hosts)
        return bool(every.item())


def told(answer: Sampled | Deferred, plan: Plan, lost: list[int]) -> Sampled | Deferred:
    """The answer to a plan of which only what is not lost was computed."""
    if callable(answer):
        return lambda: _spread(answer(), plan, lost)
    return _spread(answer, plan, lost)


def nothing(device: torch.device) -> tuple[Tensor, None]:
    """What computing no chunk gives."""
    return torch.empty(0, dtype=torch.int32, device=device), None


def _spread(sampled: Sampled, plan: Plan, lost: list[int]) -> Sampled:
    """In the rows of the whole plan; those of lost chunks hold no token."""
    rows = ~np.isin(plan.rows, lost)
    ids, logprobs = np.full(len(rows), BROKEN, np.int32), None
    ids[rows] = sampled.token_ids
    if sampled.logprobs is not None:
        logprobs = np.zeros(len(rows), np.float32)
        logprobs[rows] = sampled.logprobs
    return Sampled(ids, logprobs, tuple(lost))
