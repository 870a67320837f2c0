"""Departure: ends a model out of service that its server cannot let go of. It knows neither Triton nor ranks.

Triton unloads a model when nothing refers to it any more. 2.51 never lets go of a gRPC stream that its caller cancelled
between the last response and the stream's end: the model then stays UNLOADING until the server ends, `finalize` is not
called, and the ranks would keep their devices' memory for good. So whoever is out of service, and has long had nothing
to do, ends by itself; should `finalize` come after all, there is less left to do.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

LOOK = 2.0
"""Seconds between two looks."""
PATIENCE = 10.0
"""Seconds out of service and without a request, until it counts as forgotten."""


NOBODY = "0"
"""In the file of Latest: no process serves the model any more."""


class Departure:
    """`look` is to be called now and then, by one thread."""

    def __init__(self, serving: Callable[[], bool], idle: Callable[[], bool], leave: Callable[[], None]) -> None:
        """`serving` and `idle` say whether it is in service, and nothing is to be answered; `leave` is called once."""
        self._serving, self._idle, self._leave = serving, idle, leave
        self._served = self._left = False
        self._next = 0.0
        self._since: float | None = None

    def look(self) -> bool:
        """Leave, if it is time to; whether it has left."""
        now = time.monotonic()
        if self._left or now < self._next:
            return self._left
        self._next = now + LOOK
        if not self._forgotten():
            self._since = None
        elif self._since is None:
            self._since = now
        elif now - self._since >= PATIENCE:
            self._left = True
            self._leave()
        return self._left

    def _forgotten(self) -> bool:
        """A model that is still being loaded is not in service either."""
        serving, idle = self._serving(), self._idle()
        self._served |= serving or not idle
        return self._served and idle and not serving


class Latest:
    """Which process serves a model: the one that said so last. After a reload the server speaks for the new one alone.

    A file of this server's, in the folder of temporary files, where the launcher may write that it is nobody (see
    launcher/dismissal.py). Where it cannot be written or read, each is the latest.
    """

    def __init__(self, name: str) -> None:
        """It is this process, from now on."""
        self._file = Path(tempfile.gettempdir()) / f"tritonspeed-{os.getppid()}-{name}"
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
            with open(os.open(self._file, flags, 0o600), "w") as file:
                file.write(str(os.getpid()))
        except OSError:
            return

    def __bool__(self) -> bool:
        """Whether it still is, or the later one has ended."""
        try:
            text = self._file.read_text()
            return text != NOBODY and (int(text) == os.getpid() or not Path(f"/proc/{int(text)}").exists())
        except (OSError, ValueError):
            return True

    def close(self) -> None:
        """Leave nothing behind."""
        with suppress(OSError):
            if self or self._file.read_text() == NOBODY:
                self._file.unlink(missing_ok=True)
