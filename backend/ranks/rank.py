"""One rank: `python -m backend.ranks.rank FD` answers its parent's questions, in order, until either of them ends.

It does not know what the questions mean: a worker, named in the first message, has a method for each.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from backend.blame import places, tell
from backend.config import EngineConfig
from backend.errors import ServingError, one_line


@dataclass(frozen=True)
class Birth:
    """What a rank is told when it starts."""

    worker: str
    """module:class, called with this Birth and a function that tells the parent of progress."""
    config: EngineConfig
    rank: int
    world: int
    folder: str
    """Where the ranks find each other; private to the group."""
    parent: int
    task: str = ""
    """For workers that serve several tasks: which one."""


PING, PONG = "ping", "pong"
"""A question that the rank itself answers, and the answer; it belongs to no other question."""

Deferred = Callable[[], Any]
"""An answer that a worker gives before it is known: calling it waits, and the next question is not kept waiting."""


ROOM = 1 << 16
"""Bytes that the socket takes in any case."""

LONGEST = 2000
"""Characters of a failure's message."""

LOADING = frozenset({"capacity", "allocate", "warm_up"})
"""Questions of the start, which hold nothing that callers sent; all others may."""

log = logging.getLogger("tritonspeed")


class Rank:
    """The loop of one rank process."""

    def __init__(self, connection: Connection, birth: Birth) -> None:
        self._connection = connection
        self._answers: SimpleQueue[Callable[[], tuple[str, Any]]] = SimpleQueue()
        self._deferred, self._answered = 0, 0  # one thread counts each
        self._lock = threading.Lock()
        module, _, name = birth.worker.partition(":")
        self._worker = getattr(importlib.import_module(module), name)(birth, self._progress)
        threading.Thread(target=self._answer_deferred, daemon=True).start()

    def run(self) -> None:
        """Answer until the parent closes its end."""
        self._send(packed("ok", None))
        while True:
            method, arguments = pickle.loads(self._connection.recv_bytes())  # noqa: S301 (from our parent)
            if method == PING:
                self._send(packed(PONG, None))
                continue
            quotes = method not in LOADING
            kind, answer = attempt(lambda: getattr(self._worker, method)(*arguments), quotes)  # noqa: B023 (at once)
            if kind == "ok" and callable(answer):
                self._defer(partial(attempt, answer, quotes))
                continue
            message = packed(kind, answer)
            # It must not overtake an answer to an earlier question; and while a large one waits to be read, questions
            # must still be taken: the parent may be about to send a large one too, and reads nothing meanwhile.
            if self._deferred != self._answered or len(message) > ROOM:
                self._defer(partial(tuple, (kind, answer)))
            else:
                self._send(message)

    def _defer(self, answer: Callable[[], tuple[str, Any]]) -> None:
        self._deferred += 1
        self._answers.put(answer)

    def _answer_deferred(self) -> None:
        while True:
            self._send(packed(*self._answers.get()()))
            self._answered += 1

    def _progress(self, text: str) -> None:
        self._send(packed("progress", text))

    def _send(self, message: bytes) -> None:
        with self._lock:
            self._connection.send_bytes(message)


def packed(*parts: Any) -> bytes:
    """A message: one part alone, or all of them; protocol 5 copies arrays once."""
    return pickle.dumps(parts if len(parts) > 1 else parts[0], protocol=5)


def attempt(question: Callable[[], Any], quotes: bool = False) -> tuple[str, Any]:
    """("ok", answer), or ("error", (class name, one line)); what is not one of ours is on stderr too, with its places.

    Where its message may quote what callers sent, neither has it.
    """
    try:
        return "ok", question()
    except Exception as error:
        return "error", (type(error).__name__, _told(error, quotes)[:LONGEST])


def _told(error: Exception, quotes: bool) -> str:
    """In one line."""
    if isinstance(error, ServingError):
        return one_line(error, LONGEST)
    if quotes:
        tell(log, "a question failed", error)
        return places(error)
    traceback.print_exc()
    return f"{type(error).__name__}: {one_line(error, LONGEST)}"


def die_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends, however it ends (Linux prctl(2))."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)


def main() -> None:
    """Live until the parent is gone."""
    connection = Connection(int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole foreground group; the parent decides
    try:
        birth = pickle.loads(connection.recv_bytes())  # noqa: S301 (from our parent)
        die_with(birth.parent)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print there
        kind, rank = attempt(lambda: Rank(connection, birth))
        if kind == "error":
            connection.send_bytes(packed(kind, rank))
        else:
            rank.run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    os._exit(0)  # no destructors: destroying an NCCL group that a CUDA graph captured hangs


if __name__ == "__main__":
    main()
