"""What a GPU did while some work ran, from torch's profiler: its kernels, how long it was busy, and where it waited."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

WAIT = 3.0
"""µs: a longer gap is the host's doing; kernels of a CUDA graph follow each other sooner."""
KINDS = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Kernel:
    """One thing the GPU did; µs."""

    name: str
    start: float
    duration: float

    @property
    def end(self) -> float:
        return self.start + self.duration


@dataclass(frozen=True)
class Use:
    """A stretch of GPU time, µs."""

    span: float
    busy: float
    waiting: float
    """In gaps longer than WAIT."""


@dataclass(frozen=True)
class Line:
    """One kernel name in a profile, over all steps."""

    name: str
    count: int
    total: float
    """µs."""


def traced(work: Callable[[], object]) -> list[Kernel]:
    """Run `work` under the profiler; what the GPU did, by start."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        return kernels(json.loads(file.read_text()))


def kernels(trace: dict) -> list[Kernel]:  # type: ignore[type-arg]
    """From a trace in Chrome's format."""
    found = [
        Kernel(event["name"], float(event["ts"]), float(event.get("dur", 0)))
        for event in trace["traceEvents"]
        if event.get("cat") in KINDS
    ]
    return sorted(found, key=lambda kernel: kernel.start)


def use(done: list[Kernel]) -> Use:
    """How much of the time from the first start to the last end the GPU was busy; overlaps count once."""
    if not done:
        return Use(0, 0, 0)
    busy, gaps, end = 0.0, [], done[0].start
    for kernel in done:
        if kernel.start > end:
            gaps.append(kernel.start - end)
        busy += max(0.0, kernel.end - max(end, kernel.start))
        end = max(end, kernel.end)
    return Use(end - done[0].start, busy, sum(gap for gap in gaps if gap > WAIT))


def lines(done: list[Kernel]) -> list[Line]:
    """By name, the costliest first."""
    by_name = groupby(sorted(done, key=lambda kernel: kernel.name), key=lambda kernel: kernel.name)
    groups = [(name, [kernel.duration for kernel in group]) for name, group in by_name]
    return sorted((Line(name, len(times), sum(times)) for name, times in groups), key=lambda line: -line.total)


def middle(done: list[Kernel], steps: int) -> list[Kernel]:
    """Without the first and the last step's share of the kernels, which the profiler's own start and end disturb."""
    cut = len(done) // steps if steps > 2 else 0
    return done[cut : len(done) - cut]
