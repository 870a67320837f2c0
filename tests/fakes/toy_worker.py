"""A worker without a model, for tests of the rank group; importable by name in the ranks through PYTHONPATH."""

import os
import signal
import time

from backend.errors import InvalidInput, LoadError


class Toy:
    def __init__(self, birth, progress):
        if birth.config.model == "unloadable":
            raise LoadError("no such thing\nat all")
        if birth.config.model == "unreadable":
            raise ValueError("a header too large")
        progress("made")
        self.birth = birth

    def add(self, a, b):
        return a + b + self.birth.rank

    def deferred(self, seconds, value):
        return lambda: (time.sleep(seconds), value)[1]

    def fail(self, rank, name):
        if self.birth.rank == rank:
            raise {"InvalidInput": InvalidInput, "ValueError": ValueError}[name]("it broke")
        time.sleep(30)

    def quote(self, words, deferred):
        """Fails with the words, at once or where the answer is waited for."""

        def answer():
            raise ValueError(f"cannot read {words!r}")

        return answer if deferred else answer()

    def warm_up(self):
        raise ValueError("no kernel image is available")

    def die(self, rank, number=signal.SIGKILL):
        if self.birth.rank == rank:
            os.kill(os.getpid(), number)
        time.sleep(30)

    def die_later(self, rank, seconds):
        """The others fail at once, as a sum with one that is dying does."""
        if self.birth.rank != rank:
            raise ValueError("connection closed by peer")
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    def leave(self, rank):
        if self.birth.rank == rank:
            os._exit(3)

    def sleep(self, seconds):
        time.sleep(seconds)
