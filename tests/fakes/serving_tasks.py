"""Ask a task's Service, with its ranks, as Triton's stub does; without Triton."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from backend.config import EngineConfig
from backend.tasks.service import Service


class Asked:
    """One request of some rows and what came of it."""

    gone, given, request_id = False, {}, ""

    def __init__(self, rows):
        self._rows, self.outcome, self._done = rows, None, threading.Event()

    def parameters(self):
        return self.given

    def cancelled(self):
        return self.gone

    def rows(self):
        return self._rows

    def answer(self, outputs):
        assert self.outcome is None
        self.outcome = outputs
        self._done.set()

    fail = answer

    def result(self):
        """The outputs, or the error itself."""
        assert self._done.wait(60), "never answered"
        return self.outcome


class Served:
    """A started service."""

    def __init__(self, service):
        self.service = service

    def together(self, *requests):
        """The outcomes of requests (lists of rows) that Triton has put in one batch."""
        asked = [Asked(rows) for rows in requests]
        self.service.serve(asked)
        return [each.result() for each in asked]

    def __call__(self, *rows):
        """One request's outputs; its error is raised."""
        (outcome,) = self.together(list(rows))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


@contextmanager
def served(task, folder, **config) -> Iterator[Served]:
    service = Service(task, EngineConfig(model=str(folder), device="cpu", threads=1, **config), lambda line: None)
    service.start()
    try:
        yield Served(service)
    finally:
        service.close()
