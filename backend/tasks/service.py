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
from dataclasses import replace
from queue import Empty, Full, Queue
from typing import Any

from backend.checkpoint import resolve, root
from backend.config import EngineConfig
from backend.devices import resolved
from backend.errors import EngineDown, ServingError, serving
from backend.ranks.group import RankGroup, Report
from backend.ranks.restarts import Restarts
from backend.tasks import find
from backend.tasks.job import Asked, Job, Request
from backend.tasks.task import Array, Task

IDLE_CHECK = 0.5
"""Seconds between looks at the ranks' health while there is nothing to do."""
DEPTH = 2
"""Micro-batches that the ranks have at once: one that is computed, one that waits for it."""
STEP_TOKENS = {"cuda": 16384, "cpu": 1024}
"""Token budget of a micro-batch, unless configured."""
CLOSING = 5.0
"""Seconds for a micro-batch under way to come to its end before the ranks are killed."""
UNLOADED = "is being unloaded"


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
        self._closing = threading.Event()
        self._restarts = Restarts(self.config, self._closing, report)
        self._ended = False
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="service", daemon=True)

    # ---- any thread

    def start(self) -> None:
        """Load and warm up; LoadError with a one-line reason otherwise."""
        self._thread.start()
        self._started.result()

    @property
    def healthy(self) -> bool:
        return not self._reason()

    @property
    def pids(self) -> list[int]:
        """The ranks' processes."""
        return self._group.pids

    def serve(self, asked: Sequence[Asked]) -> None:
        """Answer each request, sooner or later, exactly once."""
        requests = [Request(each) for each in asked]
        try:
            self._put(self._job(requests))
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

    def _reason(self) -> str:
        """Why nothing is served now, or nothing."""
        return UNLOADED if self._closing.is_set() else self._down

    def _put(self, job: Job) -> None:
        """Hand a job to the service's thread once there is room; EngineDown where nobody would take it."""
        if not job.pieces:
            return self._finish(job)
        while True:
            if reason := self._reason():
                raise EngineDown(f"the model {reason}; try again later")
            try:
                self._jobs.put(job, timeout=IDLE_CHECK)
                break
            except Full:
                continue
        if self._ended:  # it may have looked for the last time before this job came
            self._fail_waiting(EngineDown(f"the model {UNLOADED}"))

    # ---- preparing, in the caller's thread

    def _job(self, requests: list[Request]) -> Job:
        parsed = [request for request in requests if self._parse(request)]
        prepared = iter(self._prepare([item for request in parsed for item in request.items]))
        pieces: list[Any] = []
        for request in parsed:
            own = [next(prepared) for _ in request.items]
            if error := next((found for found in own if isinstance(found, Exception)), None):
                request.settle(error)
                continue
            for found in own:
                request.pieces.append(range(len(pieces), len(pieces) + len(found)))
                pieces.extend(found)
        return Job(self.task, [request for request in parsed if not request.settled], pieces)

    def _parse(self, request: Request) -> bool:
        """Whether its rows could be read; one bad request fails alone."""
        try:
            request.items = [self.task.parse(row) for row in request.asked.rows()]
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
            self._ended, self._down = True, self._down or UNLOADED
            self._fail_all(EngineDown(f"the model {UNLOADED}"))
            self._group.close()

    def _step(self) -> None:
        """Keep the ranks busy, take their oldest answer, and finish what it completes while they compute the next."""
        self._feed()
        if not self._sent or not self._answering():
            return
        received = self._group.receive(self.config.step_timeout)
        job, places = self._sent.popleft()
        self._begun = time.monotonic()
        self._feed(wait=False)
        try:
            if job.fill(places, self.task.join(received)):
                self._finish(job)
        except Exception as error:  # the task's own fault: the ranks have answered
            job.fail(error)

    def _feed(self, wait: bool = True) -> None:
        while len(self._sent) < DEPTH and (job := self._next(wait)):
            places = job.left.pop(0)
            try:
                batch = self.task.batch([job.pieces[place] for place in places])
            except Exception as error:
                job.fail(error)
                continue
            if not self._sent:
                self._begun = time.monotonic()
            self._sent.append((job, places))
            self._group.send("forward", batch)

    def _answering(self) -> bool:
        """Whether an answer has come; EngineDown where none has for too long."""
        if self._group.answering(IDLE_CHECK):
            return True
        if self._late():
            raise EngineDown(f"the ranks have not answered for {self.config.step_timeout:g} s")
        return False

    def _late(self) -> bool:
        return time.monotonic() - self._begun > self.config.step_timeout

    def _next(self, wait: bool) -> Job | None:
        """A job with a micro-batch to send; waits for one only where nothing is under way."""
        if self._current and self._current.left:
            return self._current
        idle = wait and not self._sent
        try:
            self._current = self._jobs.get(timeout=IDLE_CHECK) if idle else self._jobs.get_nowait()
        except Empty:
            self._current = None
            if idle:
                self._group.check()
        return self._current

    def _finish(self, job: Job) -> None:
        for request in job.requests:
            try:
                outcome: dict[str, Array] | Exception = self._outputs(job, request)
            except Exception as error:
                outcome = error
            request.settle(outcome)

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
        self._down, self._begun = "", time.monotonic()
        self._restarts.served()
        self._report(f"ready in {time.monotonic() - start:.1f} s")

    def _recover(self, error: Exception) -> None:
        """After the ranks failed: tell everybody, start them again, slower each time; give up after max_restarts."""
        if self._closing.is_set():
            return
        reason = str(serving(error))
        self._report(f"down: {reason}")
        self._down = f"is restarting ({reason})"
        self._group.close()
        self._fail_all(EngineDown(f"{reason}; the model is restarting, try again later"))
        if self._restarts.again(self._load) or self._closing.is_set():
            return
        self._down = f"has failed for good ({reason})"
        while not self._closing.is_set():
            self._fail_all(EngineDown(f"the model {self._down}"))
            self._closing.wait(IDLE_CHECK)

    def _fail_all(self, error: ServingError) -> None:
        for job in [*(job for job, _ in self._sent), *([self._current] if self._current else [])]:
            job.fail(error)
        self._sent.clear()
        self._current = None
        self._fail_waiting(error)

    def _fail_waiting(self, error: ServingError) -> None:
        while True:
            try:
                self._jobs.get_nowait().fail(error)
            except Empty:
                return
