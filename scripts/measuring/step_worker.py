"""StepWorker: a Decoder that times chains of made-up steps by itself. It does not print, and knows no shapes.

It runs in the bench's process for one rank, and as the worker of a RankGroup for several: then every rank plays the
same plans, and rank 0's clock counts.
"""

from __future__ import annotations

import gc
import os
import pickle
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from backend.compute.decoder import Decoder
from backend.config import EngineConfig
from backend.ranks.rank import Birth
from measuring import gpu_trace
from measuring.schedules import Made, Play, decodes, prefills

ROUNDS = 3
SETTLING = 4
"""Steps at the start of a chain that do not count."""
TRACED = 14


@dataclass(frozen=True)
class Case:
    """What to time; picklable."""

    kind: str
    """decode, or prefill (with `batch` sequences decoding beside it)."""
    batch: int
    context: int
    steps: int
    play: Play
    prompt: int = 2048

    def made(self) -> list[Made]:
        count = self.steps + SETTLING
        if self.kind == "decode":
            return decodes(self.play, self.batch, self.context, count)
        return prefills(self.play, self.prompt, count, self.batch, self.context)


@dataclass(frozen=True)
class Timed:
    """What the clock says of a case, in seconds."""

    seconds: float
    """A step; the median over rounds of a chain's mean."""
    slowest: float
    """99th percentile of the time between answers."""
    host: float
    """Of a step, until its last launch: unpickling included."""
    steps: list[tuple[tuple[int, int], ...]]
    """The chunks of each step."""


@dataclass(frozen=True)
class Traced:
    """What the profiler says of a case."""

    steps: int
    use: gpu_trace.Use
    """Per step."""
    lines: tuple[gpu_trace.Line, ...]
    """All steps together."""


class StepWorker(Decoder):
    """A Decoder with a clock."""

    def __init__(self, birth: Birth, progress: Callable[[str], None]) -> None:
        self._host = 0.0
        super().__init__(birth, progress)

    def play(self, case: Case) -> None:
        """Compute a case's steps once: the cache then holds what they wrote."""
        self._chain(case.made())

    def measure(self, case: Case) -> Timed:
        """Play the same steps several times."""
        made = case.made()
        assert made, f"no such steps fit: {case}"
        settling = min(SETTLING, len(made) - 1)
        self._chain(made)
        self._host = 0.0
        gaps = [self._chain(made)[settling:] for _ in range(ROUNDS)]
        each = sorted(gap for chain in gaps for gap in chain)
        return Timed(
            statistics.median(statistics.fmean(chain) for chain in gaps),
            each[int(0.99 * (len(each) - 1))],
            self._host / (ROUNDS * len(made)),
            [step.chunks for step in made[settling:]],
        )

    def trace(self, case: Case) -> Traced:
        """Play some of the steps once more, under the profiler."""
        made = case.made()[:TRACED]
        self._chain(made)
        done = gpu_trace.middle(gpu_trace.traced(lambda: self._chain(made)), len(made))
        used, steps = gpu_trace.use(done), max(1, len(made) - 2)
        per_step = gpu_trace.Use(used.span / steps, used.busy / steps, used.waiting / steps)
        return Traced(steps, per_step, tuple(gpu_trace.lines(done)))

    def _chain(self, made: list[Made]) -> list[float]:
        """Seconds between answers, with one step sent ahead, as the engine does; the first is from the start."""
        open_steps, times = deque[Any](), [time.perf_counter()]
        for step in made:
            start = time.perf_counter()
            open_steps.append(self.step(pickle.loads(step.plan)))  # noqa: S301 (our own)
            self._host += time.perf_counter() - start
            if len(open_steps) > 1:
                _fetch(open_steps.popleft())
                times.append(time.perf_counter())
        _fetch(open_steps.popleft())
        times.append(time.perf_counter())
        return [later - earlier for earlier, later in pairwise(times)]


def _fetch(answer: Any) -> Any:
    """What a rank's second thread does with an answer that is not there yet."""
    return answer() if callable(answer) else answer


class Alone:
    """One StepWorker in this process, asked like a RankGroup."""

    def __init__(self, config: EngineConfig, report: Callable[[str], None]) -> None:
        self._worker = StepWorker(Birth("", config, 0, 1, "", os.getpid()), report)

    def call(self, method: str, *arguments: Any, timeout: float | None = None) -> list[Any]:
        return [getattr(self._worker, method)(*arguments)]

    def close(self) -> None:
        """Let go of its memory: another model may follow in this process."""
        del self._worker
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
