"""Repair: a model that has failed for good is unloaded and loaded anew; it comes back, or the index says why not.

A Python model of Triton 2.51 cannot change its own state, so only that tells the truth of it in the repository index.
It needs explicit model control. It knows neither why models fail nor how they are loaded.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from backend.launcher.states import States
from backend.launcher.tritonserver import Ports
from client.channel import Endpoint
from client.control import Control
from client.errors import Error

GRPC_KEY = "triton-grpc-protocol-admin-key"
"""The header of the key `admin-key` over gRPC; over HTTP it is the key's own name."""
_LOOK_SECONDS = 1.0
_UNLOAD_SECONDS = 60.0
_LOAD_SECONDS = 86400.0
"""The model's own load_timeout is what bounds a load."""


class Loader(Protocol):
    """What is asked of a server; see client.control."""

    def unload(self, name: str, timeout: float) -> None: ...

    def wait_gone(self, name: str, timeout: float) -> None: ...

    def load(self, name: str, timeout: float) -> None: ...


Reach = Callable[[], AbstractContextManager[Loader]]


class Repair:
    """`look` now and then, from one thread."""

    def __init__(
        self,
        states: States,
        reach: Reach,
        served: Callable[[str], bool],
        pause: float,
        say: Callable[[str], None] = print,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`served`: whether the repository still has a model; `pause`: seconds between two tries of one."""
        self._states, self._reach, self._served, self._pause, self._say, self._now = (
            states, reach, served, pause, say, now,
        )  # fmt: skip
        self._next: dict[str, float] = {}

    def look(self) -> None:
        """Try what has failed and was not tried lately."""
        for model in self._states.failed:
            if not self._served(model):
                self._states.forget(model)
            elif self._now() >= self._next.get(model, 0.0):
                self._try(model)
                self._next[model] = self._now() + self._pause

    def _try(self, model: str) -> None:
        reason = self._states.trouble(model) or ""
        self._say(f"{model} | {reason}: loading it anew")
        self._states.lose(model, reason)
        try:
            with self._reach() as server:
                if model in self._states.loaded:
                    server.unload(model, _UNLOAD_SECONDS)
                    server.wait_gone(model, _UNLOAD_SECONDS)
                server.load(model, _LOAD_SECONDS)
        except Error as error:
            self._states.lose(model, f"failed for good: {error}")
            self._say(f"{model} | {error}; next try in {self._pause / 60:g} min at the earliest")


def reach(ports: Ports, admin_key: str) -> Callable[[], Control]:
    """A way to the server's control API, opened anew each time."""
    headers = {GRPC_KEY: admin_key} if admin_key else None
    return lambda: Control(Endpoint.of(ports.local, ports.grpc, headers=headers))


@contextmanager
def looking(*looks: Callable[[], None]) -> Iterator[None]:
    """Calls each every second meanwhile, in a thread of its own. A load under way is left to the server."""
    closing = threading.Event()

    def run(look: Callable[[], None]) -> None:
        while not closing.wait(_LOOK_SECONDS):
            look()

    for each in looks:
        threading.Thread(target=run, args=(each,), daemon=True, name="looking").start()
    try:
        yield
    finally:
        closing.set()
