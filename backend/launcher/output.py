"""Output: a server's lines, all in its log, the telling ones on the terminal. It does not know why it ended."""

from __future__ import annotations

import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable

from backend.launcher.log import Log
from backend.launcher.states import OWN, States

_LOG = re.compile(r'([EWI])\d{4} [\d:.]+ \d+ ([\w.]+):\d+\] "?(.*?)"?$')
_FAILED = re.compile(r"failed to load '([^']+)' version \d+: (?:\w[\w ]*: )?(?:TritonModelException: )?(.*)")
_ECHOES = ("backend_model.cc", "pb_stub.cc")
"""Sources of Triton that report a failed load which model_lifecycle.cc reports too."""
_HARMLESS = (
    "CudaDriverHelper has not been initialized",  # on a machine without a GPU
    "failed to load all models",  # each one's own line says why
)
_REQUEST = re.compile(re.escape(OWN) + r'[^|]+ \| \{"event": "request"')
"""A journal's lines, which are for the log file alone."""
_LISTENS = '"Started HTTPService at'
_LOST = "encountered epoll_wait error"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def telling(line: str) -> str | None:
    """The line as a person wants it, or None where it is noise."""
    if line.startswith(OWN):
        return line.removeprefix(OWN)
    if any(harmless in line for harmless in _HARMLESS):
        return None
    if line.startswith("error: "):
        return f"tritonserver | {line.removeprefix('error: ')}"
    match = _LOG.match(line)
    if not match or match[1] != "E" or match[2] in _ECHOES:
        return None
    message = match[3].replace("\\n", "\n").replace('\\"', '"').strip().partition("\n")[0]
    if failed := _FAILED.match(message):
        return f"{failed[1]} | failed: {failed[2]}"
    return f"tritonserver | {message}"


class Output:
    """Reads lines until the stream ends; remembers the last ones and each failed load's reason."""

    def __init__(self, log: Log, verbose: bool, show: Callable[[str], None] | None = None) -> None:
        self.log = log
        self.tail: deque[str] = deque(maxlen=20)
        self.failures: list[str] = []
        self.states = States()
        self._listens: float | None = None
        self._verbose = verbose
        self._show = show or _print

    def read(self, lines: Iterable[str]) -> None:
        """Until end of file: what a thread does."""
        for line in lines:
            self.log.write(line)
            self._line(_CONTROL.sub("?", line.rstrip("\n")))
        self.log.close()

    def deaf(self, seconds: float) -> bool:
        """Whether a server that is not ready will never be: it has listened for so long, or lost what it waits at."""
        return self._listens is not None and time.monotonic() - self._listens > seconds

    def _line(self, line: str) -> None:
        if _REQUEST.match(line) and not self._verbose:
            return
        self.tail.append(line)
        self.states.tell(line)
        if _LISTENS in line:
            self._listens = time.monotonic()
        elif _LOST in line:
            self._listens = 0.0
        told = telling(line)
        if told and " | failed: " in told:
            self.failures.append(told.replace(" | failed: ", " failed to load: ", 1))
        if told or self._verbose:
            self._show(line if self._verbose else str(told))


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
