"""Service: one task behind Triton's dynamic batcher. It does not know what the task computes, nor Triton.

`serve` prepares requests in the caller's thread while the ranks compute. Their pieces join those that wait already, and
micro-batches are made of all of them. Where enough wait, `serve` does too, so that what comes next gathers in Triton's
queue, where its limits and deadlines hold.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from backend.checkpoint import resolve, root
from backend.config import EngineConfig
from backend.devices import MICRO_BATCH_TOKENS, resolved
from backend.errors import EngineDown, ServingError, serving
from backend.journal import Journal
from backend.metrics import TASK
from backend.ranks.group import RankGroup, Report
from backend.ranks.restarts import Restarts
from backend.tally import Tally
from backend.tasks import find
from backend.tasks.pool import Batch, Pool
from backend.tasks.request import Asked, Request
from backend.tasks.task import Task
from backend.tasks.text import Ready, Texts
from backend.tasks.watch import Watch

IDLE_CHECK = 0.5
"""Seconds between looks at the ranks' health while there is nothing to do."""
DEPTH = 2
"""Micro-batches that the ranks have at once: one that is computed, one that waits for it."""
TOKENISING = 8
"""Cores that one model's tokeniser uses at most."""
CLOSING = 5.0
"""Seconds for a micro-batch under way to come to its end before the ranks are killed."""
UNLOADED = "is being unloaded"


class Service:
    """Serves one task. `start`, then `serve` from any thread, then `close`."""

    def __init__(self, name: str, config: EngineConfig, report: Report = print) -> None:
        _tokenise_in_parallel()
        folder = resolve(config.model, root())
        machine = resolved(config)
        tokens = config.step_tokens or MICRO_BATCH_TOKENS[machine.device]
        self.config = replace(machine, model=str(folder), step_tokens=tokens)
        self.task: Task = find(name)(folder, self.config)
        self.tally = Tally(TASK)
        self._journal = Journal(report, config.journal)
        self._ready = Ready()
        self._report = report
        self._group = RankGroup(self.config, self.task.worker, report, name)
        self._pool = Pool(self.task.cut)
        self._watch = Watch()
        self._sent: deque[Batch] = deque()
        self._begun = 0.0
        self._down = "is loading"
        self._closing = threading.Event()
        self._restarts = Restarts(self.config, self._closing, report)
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="service", daemon=True)

    # ---- any thread

    def start(self) -> None:
        """Load and warm up; LoadError with a one-line reason otherwise."""
        self._thread.start()
        self._started.result()
        self._watch.start()

    @property
    def healthy(self) -> bool:
        return not self._reason()

    @property
    def pids(self) -> list[int]:
        """The ranks' processes."""
        return self._group.pids

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
        self._closing.set()
        if self._down:
            self._group.kill()  # a start may take minutes
        if self._thread.ident:
            self._thread.join(CLOSING)
            self._group.kill()  # a rank that hangs
            self._thread.join()
        self._watch.close()

    def _reason(self) -> str:
        """Why nothing is served now, or nothing."""
        return UNLOADED if self._closing.is_set() else self._down

    def _put(self, requests: list[Request]) -> None:
        """Hand them to the service's thread once there is room; EngineDown where it does not serve now.

        Who waits when the ranks fail is served by the next ones.
        """
        if reason := self._reason():
            raise EngineDown(f"the model {reason}; try again later")
        while (requests := [one for one in requests if not one.settled]) and not self._pool.put(requests, IDLE_CHECK):
            pass
        if self._closing.is_set():  # that thread may have failed what waited before these came
            _fail(self._pool.clear(), EngineDown(f"the model {UNLOADED}"))

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

    def _run(self) -> None:
        try:
            self._load()
            self._started.set_result(None)
        except BaseException as error:
            self._started.set_exception(error)
            return
        try:
            while not self._closing.is_set():
                try:
                    self._step()
                except Exception as error:
                    self._recover(error)
        finally:
            self._down = self._down or UNLOADED
            self.tally.down()
            self._fail_all(EngineDown(f"the model {UNLOADED}"))
            self._group.close()

    def _step(self) -> None:
        """Keep the ranks busy, take their oldest answer, and finish what it completes while they compute the next."""
        self._feed()
        if not self._sent or not self._answering():
            return
        self._feed(ahead=1)  # reading an answer takes a while too
        received = self._group.receive(self.config.step_timeout, since=self._begun)
        batch = self._sent.popleft()
        self._begun = time.monotonic()
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

    # ---- start and restart

    def _load(self) -> None:
        start = time.monotonic()
        self.tally.restarts += self._started.done()
        self._group.start()
        try:
            told = self._group.call("warm_up", timeout=self.config.load_timeout)
        except BaseException:
            self._group.close()
            raise
        self._down, self._begun = "", time.monotonic()
        ready = [each for each in told if isinstance(each, Ready)] or [Ready()]
        self._ready, self.tally.proof_difference = ready[0], max(each.proof for each in ready)
        self.tally.up(self.config.tensor_parallel, self._begun - start)
        self._restarts.served()
        self._report(f"ready in {time.monotonic() - start:.1f} s")

    def _recover(self, error: Exception) -> None:
        """After the ranks failed: end what they had, start them again, slower each time; give up after max_restarts."""
        if self._closing.is_set():
            return
        reason = str(serving(error))
        self._report(f"down: {reason}")
        self._down = f"is restarting ({reason})"
        self.tally.down()
        self._group.close()
        self._fail_sent(EngineDown(f"{reason}; the model is restarting, try again later"))
        if self._restarts.again(self._load) or self._closing.is_set():
            return
        self._down = f"has failed for good ({reason})"
        self._report(self._down)
        while not self._closing.is_set():
            self._fail_all(EngineDown(f"the model {self._down}"))
            self._closing.wait(IDLE_CHECK)

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
