"""A process of our own asked with pickled values: Remote asks, `answer` serves. It does not know what is asked."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PACKAGES = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]


class Remote:
    """`python -m MODULE ARGUMENTS`; one question at a time."""

    def __init__(self, module: str, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        path = os.pathsep.join([*PACKAGES, os.environ.get("PYTHONPATH", "")])
        self._name = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **(env or {}), "PYTHONPATH": path},
        )  # fmt: skip

    def send(self, question: Any) -> None:
        assert self._process.stdin
        pickle.dump(question, self._process.stdin)
        self._process.stdin.flush()

    def receive(self) -> Any:
        """The next answer; RuntimeError with what it says of itself where it fails."""
        assert self._process.stdout
        try:
            kind, value = pickle.load(self._process.stdout)  # noqa: S301 (our own process)
        except EOFError:
            raise RuntimeError(f"{self._name} ended with exit status {self._process.wait()}") from None
        if kind == "error":
            raise RuntimeError(f"{self._name}: {value}")
        return value

    def ask(self, question: Any) -> Any:
        self.send(question)
        return self.receive()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()


def answer(begin: Callable[[], Callable[[Any], Any]]) -> None:
    """In the process: say that `begin` is done, then give what it returned every question, until nobody asks."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries print there
    _say(out, "ok", None) if (work := _tried(out, begin)) else sys.exit(1)
    while True:
        try:
            question = pickle.load(sys.stdin.buffer)  # noqa: S301 (our own parent)
        except EOFError:
            os._exit(0)  # threads of libraries must not keep it
        _tried(out, lambda: _say(out, "ok", work(question)))  # noqa: B023 (called at once)


def _tried(out: Any, work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:
        _say(out, "error", f"{type(error).__name__}: {error}")


def _say(out: Any, kind: str, value: Any) -> None:
    pickle.dump((kind, value), out)
    out.flush()
