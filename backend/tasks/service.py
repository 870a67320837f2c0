"""Service: one task behind Triton's dynamic batcher. It does not know what the task computes, nor Triton.

`serve` prepares a batch in the caller's thread while the ranks compute the one before; it waits where two are ahead, so
that what comes next gathers in Triton's queue, where its limits and deadlines hold.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from queue import Empty, Full, Queue
from typing import Any, Protocol

from backend.checkpoint import resolve, root
from backend.config import EngineConfig
from backend.devices import resolved
from backend.errors import EngineDown, ServingError
from backend.ranks.group import RankGroup, Report
from backend.tasks import find
from backend.tasks.task import Array, Row, Task

IDLE_CHECK = 0.5
"""Seconds between looks at the ranks' health while there is nothing to do."""
DEPTH = 2
"""Micro-batches that the ranks have at once: one that is computed, one that waits for it."""
STEP_TOKENS = {"cuda": 16384, "cpu": 1024}
"""Token budget of a micro-batch, unless configured."""
SETTLED = 60.0
"""Seconds of service after which a failure counts as the first."""


class Asked(Protocol):
    """One request; exactly one of the two ways of answering is used, once."""

    def rows(self) -> list[Row]:
        """Its inputs; InvalidInput where they cannot be read."""

    def answer(self, outputs: dict[str, Array]) -> None: ...

    def fail(self, error: Exception) -> None: ...


@dataclass
class Request:
    """What one request is made of while it is served."""

    asked: Asked
    items: list[Any]
    pieces: list[range]
    """Each item's, by their places in the job."""


class Job:
    """The requests that Triton batched: their pieces, cut into micro-batches, and the answers so far."""

    def __init__(self, task: Task, requests: list[Request], pieces: list[Any]) -> None:
        self.requests, self.pieces = requests, pieces
        self.left = task.cut(pieces) if pieces else []
        self.missing = len(pieces)
        self.answers: list[Any] = [None] * len(pieces)

    def fill(self, places: Sequence[int], answers: Sequence[Array]) -> bool:
        """Take the answers of a micro-batch; whether they were the last."""
        if len(answers) != len(places):
            raise ServingError(f"the ranks answered with {len(answers)} arrays for {len(places)} pieces")
        for place, answer in zip(places, answers, strict=True):
            self.answers[place] = answer
        self.missing -= len(places)
        return self.missing == 0


class Service:
    """Serves one task. `start`, then `serve` from any thread, then `close`."""

    def __init__(self, name: str, config: EngineConfig, report: Report = print) -> None:
        folder = resolve(config.model, root())
        machine = resolved(config)
        tokens = config.step_tokens or STEP_TOKENS[machine.device]
        self.config = replace(machine, model=str(folder), step_tokens=tokens)
        self.task: Task = find(name)(folder, self.config)
        self._report = report
        self._group = RankGroup(self.config, self.task.worker, report, name)
        self._jobs: Queue[Job] = Queue(maxsize=1)
        self._sent: deque[tuple[Job, list[int]]] = deque()
        self._current: Job | None = None
        self._down = "is loading"
        self._failures = 0
        self._closing = threading.Event()
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="service", daemon=True)

    # ---- any thread

    def start(self) -> None:
        """Load and warm up; LoadError with a one-line reason otherwise."""
        self._thread.start()
        self._started.result()

    @property
    def healthy(self) -> bool:
        return not self._down

    @property
    def pids(self) -> list[int]:
        """The ranks' processes."""
        return self._group.pids

    def serve(self, asked: Sequence[Asked]) -> None:
        """Answer each request, sooner or later, exactly once."""
        try:
            job = self._job(asked)
            while job.pieces:
                if self._down:
                    raise EngineDown(f"the model {self._down}; try again later")
                try:
                    return self._jobs.put(job, timeout=IDLE_CHECK)
                except Full:
                    continue
            self._finish(job)
        except Exception as error:
            for request in job.requests:
                request.asked.fail(error)

    def close(self) -> None:
        """End the ranks and every request still open."""
        starting, self._down = bool(self._down), "is being unloaded"
        self._closing.set()
        if starting:
            self._group.kill()  # a start may take minutes
        if self._thread.ident:
            self._thread.join()

    # ---- preparing, in the caller's thread

    def _job(self, asked: Sequence[Asked]) -> Job:
        parsed = [(each, items) for each in asked if (items := self._parse(each)) is not None]
        prepared = iter(self._prepare([item for _, items in parsed for item in items]))
        requests: list[Request] = []
        pieces: list[Any] = []
        for each, items in parsed:
            own = [next(prepared) for _ in items]
            if error := next((found for found in own if isinstance(found, Exception)), None):
                each.fail(error)
                continue
            places = []
            for found in own:
                places.append(range(len(pieces), len(pieces) + len(found)))
                pieces.extend(found)
            requests.append(Request(each, items, places))
        return Job(self.task, requests, pieces)

    def _parse(self, asked: Asked) -> list[Any] | None:
        try:
            return [self.task.parse(row) for row in asked.rows()]
        except Exception as error:  # one bad request fails alone
            asked.fail(error)
            return None

    def _prepare(self, items: list[Any]) -> list[Any]:
        """Together, which is faster; one by one where that fails, so that one alone does."""
        try:
            return [*self.task.prepare(items)]
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
        while not self._closing.is_set():
            try:
                self._step()
            except Exception as error:
                self._recover(error)
        self._fail_all(EngineDown("the model is being unloaded"))
        self._group.close()

    def _step(self) -> None:
        """Keep the ranks busy, then take their oldest answer."""
        while len(self._sent) < DEPTH and (job := self._next()):
            places = job.left.pop(0)
            self._sent.append((job, places))
            self._group.send("forward", self.task.batch([job.pieces[place] for place in places]))
        if not self._sent:
            return
        if self._group.answering(IDLE_CHECK) or self._late():
            answers = self.task.join(self._group.receive(self.config.step_timeout))
            job, places = self._sent.popleft()
            self._begun = time.monotonic()
            if job.fill(places, answers):
                self._finish(job)

    def _late(self) -> bool:
        return time.monotonic() - self._begun > self.config.step_timeout

    def _next(self) -> Job | None:
        """A job with a micro-batch to send; waits for one only where nothing is under way."""
        if self._current and self._current.left:
            return self._current
        try:
            self._current = self._jobs.get_nowait() if self._sent else self._jobs.get(timeout=IDLE_CHECK)
        except Empty:
            self._current = None
            if not self._sent:
                self._group.check()
            return None
        if not self._sent:
            self._begun = time.monotonic()
        return self._current

    def _finish(self, job: Job) -> None:
        for request in job.requests:
            try:
                request.asked.answer(self._outputs(job, request))
            except Exception as error:
                request.asked.fail(error)

    def _outputs(self, job: Job, request: Request) -> dict[str, Array]:
        results = [
            self.task.finish(item, [job.pieces[at] for at in places], [job.answers[at] for at in places])
            for item, places in zip(request.items, request.pieces, strict=True)
        ]
        return self.task.outputs(results)

    # ---- start and restart

    def _load(self) -> None:
        start = time.monotonic()
        self._group.start()
        try:
            self._group.call("warm_up", timeout=self.config.load_timeout)
        except BaseException:
            self._group.close()
            raise
        self._down, self._since, self._begun = "", time.monotonic(), time.monotonic()
        self._report(f"ready in {time.monotonic() - start:.1f} s")

    def _recover(self, error: Exception) -> None:
        """After the ranks failed: tell everybody, start them again, slower each time; give up after max_restarts."""
        reason = str(error) or type(error).__name__
        self._report(f"down: {reason}")
        self._down = f"is restarting ({reason})"
        self._group.close()
        self._fail_all(EngineDown(f"{reason}; the model is restarting, try again later"))
        self._failures = 0 if time.monotonic() - self._since > SETTLED else self._failures
        for attempt in range(self.config.max_restarts):
            self._failures += 1
            if self._closing.wait(min(30.0, self.config.restart_backoff * 2 ** (self._failures - 1))):
                return
            try:
                return self._load()
            except Exception as failure:
                self._report(f"restart {attempt + 1} failed: {failure}")
        self._down = f"has failed for good ({reason})"
        while not self._closing.is_set():
            self._fail_all(EngineDown(f"the model {self._down}"))
            self._closing.wait(IDLE_CHECK)

    def _fail_all(self, error: ServingError) -> None:
        jobs = {id(job): job for job, _ in self._sent}
        if self._current:
            jobs[id(self._current)] = self._current
        while not self._jobs.empty():
            job = self._jobs.get()
            jobs[id(job)] = job
        self._sent.clear()
        self._current = None
        for job in jobs.values():
            if job.missing:
                for request in job.requests:
                    request.asked.fail(error)
