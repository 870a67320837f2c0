"""Service: one task behind Triton's dynamic batcher. It does not know what the task computes, nor Triton.

`serve` prepares requests in the caller's thread while the ranks compute. Their pieces join those that wait already, and
micro-batches are made of all of them. Where enough wait, `serve` does too, so that what comes next gathers in Triton's
queue, where its limits and deadlines hold.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from backend.asked import Asked
from backend.config import EngineConfig
from backend.devices import MICRO_BATCH_TOKENS, resolved
from backend.errors import EngineDown, ServingError
from backend.journal import Journal
from backend.metrics import TASK
from backend.model_folder import resolve, root
from backend.ranks.group import RankGroup, Report
from backend.ranks.lifecycle import IDLE_CHECK, STUCK, Hooks, Lifecycle, unloaded
from backend.tally import Tally
from backend.tasks import find
from backend.tasks.pool import Batch, Pool
from backend.tasks.request import Request
from backend.tasks.task import Task
from backend.tasks.text import Ready, Texts
from backend.tasks.watch import Watch

DEPTH = 2
"""Micro-batches that the ranks have at once: one that is computed, one that waits for it."""
TOKENISING = 8
"""Cores that one model's tokeniser uses at most."""


class Service:
    """Serves one task. `start`, then `serve` from any thread, then `close`."""

    def __init__(self, name: str, config: EngineConfig, report: Report = print, model: str = "") -> None:
        """`name` is the task's, `model` the model's, for traces."""
        _tokenise_in_parallel()
        folder = resolve(config.model, root())
        machine = resolved(config)
        tokens = config.step_tokens or MICRO_BATCH_TOKENS[machine.device]
        self.config = replace(machine, model=str(folder), step_tokens=tokens)
        self.task: Task = find(name)(folder, self.config)
        self.tally = Tally(TASK, self.config.step_timeout + STUCK)
        self._journal = Journal(report, config.journal, model)
        self._ready = Ready()
        self._group = RankGroup(self.config, self.task.worker, report, name)
        self._pool = Pool(self.task.cut)
        self._watch = Watch()
        self._sent: deque[Batch] = deque()
        self._begun = 0.0
        hooks = Hooks(load=self._load, serve=self._step, fail_begun=self._fail_sent, fail_all=self._fail_all)
        self._life = Lifecycle(self.config, self._group, self.tally, report, hooks)

    # ---- any thread

    def start(self) -> None:
        """Load and warm up; LoadError with a one-line reason otherwise."""
        self._life.start()
        self._watch.start()

    @property
    def healthy(self) -> bool:
        return not self._life.down

    def serve(self, asked: Sequence[Asked]) -> None:
        """Answer each request, sooner or later, exactly once."""
        requests = [Request(each, self.tally, self._journal.entry(each)) for each in asked]
        try:
            prepared = self._prepared(requests)
            self._watch.add(prepared)
            self._put(prepared)
        except Exception as error:
            for request in requests:
                request.settle(error)

    def close(self) -> None:
        """End the ranks and every request still open."""
        self._life.close()
        self._watch.close()

    def _put(self, requests: list[Request]) -> None:
        """Hand them to the service's thread once there is room; EngineDown where it does not serve now.

        Who waits when the ranks fail is served by the next ones.
        """
        self._life.check()
        while (requests := [one for one in requests if not one.settled]) and not self._pool.put(requests, IDLE_CHECK):
            pass
        if self._life.closing.is_set():  # that thread may have failed what waited before these came
            _fail(self._pool.clear(), unloaded())

    # ---- preparing, in the caller's thread

    def _prepared(self, requests: list[Request]) -> list[Request]:
        """Those that have pieces to be computed; the others are answered."""
        parsed = [request for request in requests if self._parse(request)]
        prepared = iter(self._prepare([item for request in parsed for item in request.items]))
        for request in parsed:
            own = [next(prepared) for _ in request.items]
            if error := next((found for found in own if isinstance(found, Exception)), None):
                request.settle(error)
                continue
            request.take(own)
            if not request.pieces:
                request.finish(self.task)
        return [request for request in parsed if not request.settled]

    def _parse(self, request: Request) -> bool:
        """Whether its rows could be read; one bad request fails alone."""
        try:
            request.read(self.task)
        except Exception as error:
            request.settle(error)
        return not request.settled

    def _prepare(self, items: list[Any]) -> list[Any]:
        """Together, which is faster; one by one where that fails, so that one alone does."""
        try:
            prepared: list[Any] = [*self.task.prepare(items)]
            if len(prepared) != len(items):
                raise ServingError(f"{len(items)} items were prepared as {len(prepared)}")
            return prepared
        except Exception as error:
            if len(items) < 2:
                return [error] * len(items)
            return [self._prepare([item])[0] for item in items]

    # ---- the service's thread

    def _load(self) -> str:
        """Warm up ranks that have just started."""
        told = self._group.call("warm_up", timeout=self.config.load_timeout)
        self._begun = time.monotonic()
        ready = [each for each in told if isinstance(each, Ready)] or [Ready()]
        self._ready, self.tally.proof_difference = ready[0], max(each.proof for each in ready)
        return ""

    def _step(self) -> None:
        """Keep the ranks busy, take their oldest answer, and finish what it completes while they compute the next."""
        self.tally.turn()
        self._feed()
        if not self._sent or not self._answering():
            return
        self._feed(ahead=1)  # reading an answer takes a while too
        received = self._group.receive(self.config.step_timeout, since=self._begun)
        batch = self._sent.popleft()
        self._begun = time.monotonic()
        self.tally.done()
        try:
            answers = self._joined(received, batch)
        except Exception as error:  # the task's own fault: the ranks have answered
            return _fail(batch, error)
        for waiting, answer in zip(batch, answers, strict=True):
            if isinstance(answer, ServingError):
                waiting.request.settle(answer)
            elif waiting.request.fill(waiting.place, answer):
                waiting.request.finish(self.task)

    def _joined(self, received: list[Any], batch: Batch) -> list[Any]:
        """An array a piece, or why it has none."""
        answers = self.task.join(received)
        if len(answers) != len(batch):
            raise ServingError(f"the ranks answered with {len(answers)} arrays for {len(batch)} pieces")
        return answers

    def _feed(self, ahead: int = 0) -> None:
        """Send micro-batches until the ranks have DEPTH, and so many more."""
        while len(self._sent) - ahead < DEPTH and (batch := self._next(len(self._sent) - ahead)):
            try:
                message = self.task.batch([waiting.piece for waiting in batch])
            except Exception as error:
                _fail(batch, error)
                continue
            if not self._sent:
                self._begun = time.monotonic()
            self._sent.append(batch)
            self._group.send("forward", message)
            self.tally.step(*_tokens(message, len(batch), self._ready))

    def _answering(self) -> bool:
        """Whether an answer has come; EngineDown where none has for too long."""
        if self._group.answering(IDLE_CHECK):
            return True
        if self._late():
            raise EngineDown(f"the ranks have not answered for {self.config.step_timeout:g} s")
        return False

    def _late(self) -> bool:
        return time.monotonic() - self._begun > self.config.step_timeout

    def _next(self, busy: int) -> Batch:
        """A micro-batch; waits for one only where nothing is under way. Busy ranks get none that may yet grow."""
        idle = not self._sent
        batch = self._pool.take(IDLE_CHECK if idle else 0, full=busy > 0)
        if idle and not batch:
            self._group.check()
        return batch

    def _fail_sent(self, error: ServingError) -> None:
        """End the requests that have a piece among what the ranks got."""
        sent, self._sent = self._sent, deque()
        for batch in sent:
            _fail(batch, error)

    def _fail_all(self, error: ServingError) -> None:
        self._fail_sent(error)
        _fail(self._pool.clear(), error)


def _tokenise_in_parallel() -> None:
    """One core tokenises less than a GPU computes. The launcher has said no, on behalf of what forks; this does not."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ.setdefault("RAYON_NUM_THREADS", str(min(TOKENISING, len(os.sched_getaffinity(0)))))


def _tokens(message: Any, pieces: int, ready: Ready) -> tuple[int, int]:
    """Of a micro-batch, without padding and with it; of anything but texts, its pieces."""
    if not isinstance(message, Texts):
        return pieces, pieces
    return int(message.lengths.sum()), ready.computed(message)


def _fail(batch: Batch, error: Exception) -> None:
    """End the requests of these pieces; what the ranks still compute of them is not wanted."""
    for waiting in batch:
        waiting.request.settle(error)
