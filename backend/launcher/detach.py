"""Starting the launcher in the background and waiting until it is ready. It does not know what it serves."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_READY = "TRITONSPEED_READY_FD"
"""Environment variable: the number of a pipe's end that takes one byte when all is ready."""


def start(arguments: Sequence[str], folder: Path) -> int:
    """Runs the launcher in a session of its own, its words in a log; returns 0 once ready, else its exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"serve-{os.getpid()}.log"
    theirs, ours = os.pipe()
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "backend.server", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env={**os.environ, _READY: str(ours)},
            pass_fds=[ours],
            start_new_session=True,
        )
    os.close(ours)
    try:
        came_up = _follow(log, theirs)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        return 130
    if not came_up:
        return process.wait() or 1
    print(f"running in the background as process {process.pid}; log: {log}", file=sys.stderr)
    return 0


def tell_ready() -> None:
    """Called in the background process: lets `start` return."""
    if handle := os.environ.pop(_READY, None):
        os.write(int(handle), b"1")
        os.close(int(handle))


def _follow(log: Path, pipe: int) -> bool:
    """Copies the log to standard error until the pipe says ready (True) or its other end is gone (False)."""
    with log.open() as words:
        while not select.select([pipe], [], [], 0.2)[0]:
            sys.stderr.write(words.read())
        came_up = os.read(pipe, 1) == b"1"
        sys.stderr.write(words.read())
    os.close(pipe)
    return came_up
