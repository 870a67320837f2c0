"""A process that asks a server for streams with this project's client: `python -m measuring.stream_client PORT`.

One Python process reads some thousand responses a second; many streams need several of them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from client import DeadlineExceeded, Overloaded, pipeline
from measuring.figures import Trace
from measuring.remote import answer
from measuring.workloads import Request

TIMEOUT = 1800
Ask = Callable[[Request], Iterable[int]]
"""Gives the number of tokens of each response as it comes."""


def begin(port: str) -> Callable[[Any], list[Trace]]:
    pipe = pipeline("generate", port=int(port), timeout=TIMEOUT, retries=0)  # a refusal is a figure

    def ask(request: Request) -> Iterable[int]:
        deltas = pipe.stream(request.ids, max_tokens=request.output, temperature=0.0, ignore_eos=True)
        return (delta.num_output_tokens or 0 for delta in deltas)

    return lambda question: play(ask, *question)


def play(ask: Ask, start: float, clients: int, requests: list[Request]) -> list[Trace]:
    """Traces of requests whose clock starts at `start` (time.perf_counter, which all processes share).

    `clients` threads take them one after the other; 0: each has a thread of its own and waits for its time.
    """
    with ThreadPoolExecutor(min(clients, len(requests)) or len(requests)) as threads:
        jobs = [threads.submit(_one, ask, start, request, bool(clients)) for request in requests]
        return [job.result() for job in jobs]


def _one(ask: Ask, start: float, request: Request, closed: bool) -> Trace:
    time.sleep(max(0.0, start + request.at - time.perf_counter()))
    trace = Trace(time.perf_counter() - start if closed else request.at)
    try:
        for count in ask(request):
            trace.arrivals.append((time.perf_counter() - start, count))
    except (Overloaded, DeadlineExceeded) as error:
        trace.refused = repr(error)
    return trace


if __name__ == "__main__":
    answer(lambda: begin(sys.argv[1]))
