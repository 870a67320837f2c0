"""Dismissal: tells a model that the server has long been unloading that nobody will ask it any more.

Triton 2.51 tells a model of its end only once every request has let go of it, and never lets go of a gRPC stream that
its caller cancelled at the last response. What the model then does is backend/departure.py's.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Protocol

from backend.departure import NOBODY
from client.control import Model
from client.errors import Error

LOOK = 5.0
"""Seconds between two looks at the server's index, each of which takes some milliseconds."""
PATIENCE = 15.0
"""Seconds that unloading may take. Requests under way are finished in any case."""


class Index(Protocol):
    """What is asked of a server; see client.control."""

    def models(self) -> list[Model]: ...


class Dismissal:
    """`look` now and then, from one thread."""

    def __init__(
        self,
        reach: Callable[[], AbstractContextManager[Index]],
        folder: Path,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`folder`: the server's own for temporary files."""
        self._reach, self._folder, self._now = reach, folder, now
        self._next = 0.0
        self._since: dict[str, float] = {}

    def look(self) -> None:
        """Dismiss what has been unloading for too long."""
        now = self._now()
        if now < self._next:
            return
        self._next = now + LOOK
        with suppress(Error), self._reach() as server:  # a busy server: the next look will do
            leaving = {model.name for model in server.models() if model.state == "UNLOADING"}
            self._since = {name: self._since.get(name, now) for name in leaving}
        for name, since in self._since.items():
            if now - since >= PATIENCE:
                self._dismiss(name)

    def _dismiss(self, name: str) -> None:
        own = re.compile(rf"tritonspeed-\d+-{re.escape(name)}_\d+_\d+-\d+")  # server, instance, version
        for file in self._folder.iterdir():
            if own.fullmatch(file.name):
                file.write_text(NOBODY)
