"""Service: the threads between the callers and the engine. It knows neither Triton nor how tokens are made.

Some tokenise what comes in, some send what comes out, one asks now and then whether the callers are still there: the
engine's thread does none of that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from heapq import heappop, heappush
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any

from backend.asked import Streaming
from backend.config import EngineConfig
from backend.generation.delivery import Delivery, refuse
from backend.generation.engine import DECODER, Engine
from backend.generation.request import Request
from backend.journal import Entry, Journal
from backend.ranks.group import Report
from backend.ranks.lifecycle import unloaded
from backend.tally import Tally

SENDERS = 2
"""A send waits for Triton with the interpreter free for others; one thread reaches RESPONSES, a second shortens bursts.
More of them only cost: on 2 cores 35 to 45 µs a token with one, 45 to 50 with two or four, at the same rate."""
TOKENISERS = 8
RESPONSES = 6000.0
"""Responses a second, over all streams: sends cost 100 to 300 µs each, and share the interpreter with the engine. With
4,000 of them 25 streams missed every other step of 6 ms; 6,000 cost no tokens at 256 streams."""
CANCEL_POLL = 0.1
CANCEL_COST = 0.002
"""Seconds between two questions to the same caller whether it is still there, and at least between any two: each costs
about 100 µs, so all together take at most a twentieth of a core."""
CLOSING = 5.0
"""Seconds for the last answers at the end."""


class Service:
    """Serves one generative model. `start`, then `serve` from any thread, then `close`."""

    def __init__(self, config: EngineConfig, report: Report = print, worker: str = DECODER, model: str = "") -> None:
        """`model` is its name, for traces."""
        self.engine = Engine(config, report, worker)
        self._journal = Journal(report, config.journal, model)
        self._tokenising = ThreadPoolExecutor(TOKENISERS, "tokeniser")
        self._outbox: SimpleQueue[Delivery | None] = SimpleQueue()
        self._later: SimpleQueue[tuple[float, Delivery] | None] = SimpleQueue()
        self._open: dict[Delivery, None] = {}
        self._closing = threading.Event()
        works = [self._send] * SENDERS + [self._wake, self._watch]
        self._threads = [threading.Thread(target=work, name=work.__name__, daemon=True) for work in works]

    def start(self) -> None:
        """Load, and begin to serve; LoadError with a one-line reason otherwise."""
        self.engine.start()
        together = threading.Barrier(TOKENISERS)  # an executor makes its threads one by one, as work comes: all now
        for _ in range(TOKENISERS):
            self._tokenising.submit(together.wait)
        for thread in self._threads:
            thread.start()

    @property
    def healthy(self) -> bool:
        return self.engine.healthy

    @property
    def tally(self) -> Tally:
        return self.engine.tally

    def serve(self, asked: Sequence[Streaming]) -> None:
        """Answer each, later, with errors too."""
        for one in asked:
            entry = self._journal.entry(one)
            try:
                parameters, rows = one.parameters(), one.rows()
                self._tokenise(one, entry, rows, parameters)
            except Exception as error:  # must not leave here: Triton would free the way back of all of them
                refuse(one, error)
                entry.close(error)

    def _tokenise(self, *request: Any) -> None:
        try:
            self._tokenising.submit(self._begin, *request)
        except RuntimeError:  # there are no such threads any more
            raise unloaded() from None

    def close(self) -> None:
        """End the engine; every request that is still open gets its error."""
        self.engine.close()
        self._tokenising.shutdown()
        deadline = time.monotonic() + CLOSING
        for delivery in list(self._open):  # one that came too late for the engine
            delivery.stream.fail(unloaded())
        while self._open and time.monotonic() < deadline:
            time.sleep(0.01)
        self._closing.set()
        self._later.put(None)
        for _ in range(SENDERS):
            self._outbox.put(None)
        for thread in self._threads:
            if thread.ident:
                thread.join()

    def _begin(self, asked: Streaming, entry: Entry, rows: list[dict[str, Any]], parameters: dict[str, Any]) -> None:
        """A tokeniser's thread: from values to a request that runs."""
        try:
            request = Request.parse(rows, parameters, self.engine)
            delivery = Delivery(request, asked, self._outbox.put, lambda *due: self._later.put(due), entry)
            entry.add("tokens_in", sum(len(prompt.token_ids) for prompt in request.prompts))
            delivery.stream = self.engine.open(request.prompts, delivery.notify)
        except Exception as error:
            refuse(asked, error)
            entry.close(error)
        else:
            self._open[delivery] = None
            delivery.release()

    def _send(self) -> None:
        """A sender's thread."""
        while (delivery := self._outbox.get()) is not None:
            if delivery.send(len(self._open) / RESPONSES):
                del self._open[delivery]
                self.engine.leave(delivery.stream)

    def _wake(self) -> None:
        """The thread that has news sent which came before their time."""
        due: list[tuple[float, int, Delivery]] = []
        for number in count():
            try:
                asked = self._later.get(timeout=max(0.0, due[0][0] - time.monotonic()) if due else None)
            except Empty:
                pass
            else:
                if asked is None:
                    return
                heappush(due, (asked[0], number, asked[1]))
            while due and due[0][0] <= time.monotonic():
                heappop(due)[-1].wake()

    def _watch(self) -> None:
        """The thread that asks callers whether they are still there, one after the other."""
        while not self._closing.wait(CANCEL_POLL if not self._open else 0.0):
            for delivery in list(self._open):
                delivery.look()
                self._closing.wait(max(CANCEL_COST, CANCEL_POLL / max(1, len(self._open))))
