"""Child: one tritonserver process and all that descends from it, from start to the last of them gone.

It does not know what is served. Signals to this process are taken in one place (`wait`), not in handlers.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import IO

import psutil

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_ORPHAN_SECONDS = 3.0
"""What stubs and ranks get to notice that their parent is gone, before they are killed."""


class Child:
    """Made on the main thread: the kernel ends the child when the thread that started it ends."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], folder: Path, read: Callable[[IO[str]], None]
    ) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphaned stubs and ranks become ours to end and to reap
        signal.pthread_sigmask(signal.SIG_BLOCK, [*STOPS, signal.SIGCHLD])
        parent = os.getpid()

        def inside() -> None:
            signal.pthread_sigmask(signal.SIG_SETMASK, [])
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:
                os._exit(1)

        self._process = subprocess.Popen(
            command,
            env=dict(environment),
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches this process alone, which forwards it once
            preexec_fn=inside,  # noqa: PLW1509 no thread runs yet
        )
        assert self._process.stdout is not None
        self._reader = Thread(target=read, args=(self._process.stdout,), daemon=True, name="tritonserver output")
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ended(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def wait(self, seconds: float) -> bool:
        """Sleeps until a stop signal (True), the child's end, or the time limit."""
        end = time.monotonic() + seconds
        while self.ended() is None and (left := end - time.monotonic()) > 0:
            received = signal.sigtimedwait([*STOPS, signal.SIGCHLD], left)
            if received and received.si_signo != signal.SIGCHLD:
                return True
            self._reap()
        return False

    def stop(self, limit: float) -> bool:
        """Asks it to finish what is in flight and end: True. A second signal or the limit kills it: False."""
        if self.ended() is None:
            self._process.terminate()
            self.wait(limit)
        drained = self.ended() is not None
        self.kill()
        return drained

    def kill(self) -> None:
        """Ends it and whatever of its descendants is still there; returns when none is left."""
        if self.ended() is None:
            self._process.kill()
            self._process.wait()
        _, left = psutil.wait_procs(psutil.Process().children(recursive=True), timeout=_ORPHAN_SECONDS)
        for process in left:
            process.kill()
        psutil.wait_procs(left, timeout=_ORPHAN_SECONDS)
        self._reader.join(timeout=1)  # the last lines

    def _reap(self) -> None:
        """Waits for orphans that ended: the child's own descendants are its own to wait for."""
        for process in psutil.Process().children():
            if process.pid != self.pid and process.status() == psutil.STATUS_ZOMBIE:
                process.wait()
