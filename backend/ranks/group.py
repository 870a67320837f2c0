"""RankGroup: N rank processes that answer one question together. It does not know what they compute.

A group lives and dies as one: when a rank ends, raises or does not answer in time, every call fails with EngineDown (or
the rank's own LoadError) and the owner closes the group and starts another.
"""

from __future__ import annotations

import os
import pickle
import select
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from backend.config import EngineConfig
from backend.errors import EngineDown, LoadError, ServingError
from backend.interpreter import python
from backend.ranks.pulse import Pulse
from backend.ranks.rank import PING, PONG, Birth, packed

Report = Callable[[str], None]

GLANCE = 0.05
"""Seconds that are waited for a sign of life, which takes less than one thousandth of that."""
MOMENT = 0.3
"""Seconds within which a rank whose sockets are closed is gone."""
SLICE = 0.5
"""Seconds of waiting for an answer after which the owner may look after other things."""
LAST_GLANCE = 1.0
"""The same before a rank counts as hung: the whole machine may have stood still."""


@dataclass
class _Member:
    rank: int
    process: subprocess.Popen[bytes]
    connection: Connection


class RankGroup:
    """Starts the ranks, asks them, and ends them. One thread uses it; the ranks die with that thread."""

    def __init__(
        self,
        config: EngineConfig,
        worker: str,
        report: Report = print,
        task: str = "",
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """`meanwhile` is called on the owner's thread, now and then, while that waits for answers."""
        self._config = config
        self._meanwhile = meanwhile
        self._task = task
        self._worker = worker
        self._report = report
        self._members: list[_Member] = []
        self._folder = ""
        self._killed = False
        self._pulse = Pulse(config.heartbeat_timeout)

    def start(self) -> None:
        """Start the ranks and wait for their workers. Raises LoadError or EngineDown, with no rank left."""
        self._folder = tempfile.mkdtemp(prefix="tritonspeed-ranks-")
        try:
            for rank in range(self._config.tensor_parallel):
                self._members.append(self._spawn(rank))
                if self._killed:
                    raise EngineDown("the ranks were ended while they started")
            self.receive(self._config.load_timeout)
        except BaseException:
            self.close()
            raise
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def call(self, method: str, *arguments: Any, timeout: float | None = None) -> list[Any]:
        """Ask every rank and wait for all: their answers in rank order."""
        self.send(method, *arguments)
        return self.receive(timeout or self._config.step_timeout)

    def send(self, method: str, *arguments: Any) -> None:
        """Ask every rank without waiting; `receive` gives the answers in the order of the questions."""
        question = packed(method, arguments)
        for member in self._members:
            try:
                member.connection.send_bytes(question)
            except BlockingIOError:
                raise EngineDown(
                    f"rank {member.rank} has taken no question for {self._config.step_timeout:g} s"
                ) from None
            except OSError:
                raise _died(member) from None

    def receive(self, timeout: float, since: float | None = None) -> list[Any]:
        """Every rank's answer to the oldest question not yet received; seconds for all of them, from `since` or now."""
        deadline = (time.monotonic() if since is None else since) + timeout
        answers: dict[int, Any] = {}
        waiting = self._members
        while waiting:
            left = deadline - time.monotonic()
            ready = _ready(waiting, max(0.0, min(SLICE, left)))
            if not ready and left <= SLICE:
                raise EngineDown(f"rank {waiting[0].rank} has not answered for {timeout:g} s")
            for member in ready:
                self._take(member, answers)
            self._meanwhile()
            waiting = [member for member in waiting if member.rank not in answers]
        self._pulse.heard()
        return [answers[member.rank] for member in self._members]

    def answering(self, seconds: float) -> bool:
        """Whether a rank has something to say, or has ended, within `seconds`."""
        return bool(_ready(self._members, seconds))

    def check(self) -> None:
        """Raise EngineDown if a rank has ended or hangs; for idle ranks alone, every now and then."""
        for member in self._members:
            if member.process.poll() is not None:
                raise _died(member)
        if self._pulse.due:
            self._pulse.ask(range(len(self._members)))
            self.send(PING)
        self._listen(GLANCE)
        if self._pulse.hung:
            self._listen(LAST_GLANCE)
        if hung := self._pulse.hung:
            raise EngineDown(f"rank {hung[0]} has given no sign of life for {self._pulse.limit:g} s")

    def _listen(self, seconds: float) -> None:
        """For signs of life that are due."""
        deadline = time.monotonic() + seconds
        while self._pulse.owing and (ready := _ready(self._members, max(0.0, deadline - time.monotonic()))):
            for member in ready:
                self._take(member, {})

    def kill(self) -> None:
        """End the ranks at once and for good; any thread may call it, the owner's calls then fail with EngineDown."""
        self._killed = True
        self._end()

    def close(self) -> None:
        """End the ranks and wait until they are gone; `start` may follow."""
        self._end()
        for member in self._members:
            member.process.wait()
            member.connection.close()
        self._members = []

    def _end(self) -> None:
        for member in list(self._members):
            member.process.kill()

    def _spawn(self, rank: int) -> _Member:
        ours, theirs = socket.socketpair()
        seconds, part = divmod(self._config.step_timeout, 1)  # a rank that hangs does not read either
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(seconds), int(part * 1e6)))
        with theirs:
            process = subprocess.Popen(
                [python(), "-P", "-m", "backend.ranks.rank", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment(self._config, rank),
            )
        connection = Connection(ours.detach())
        world = self._config.tensor_parallel
        birth = Birth(self._worker, self._config, rank, world, self._folder, os.getpid(), self._task)
        connection.send_bytes(packed(birth))
        return _Member(rank, process, connection)

    def _take(self, member: _Member, answers: dict[int, Any]) -> None:
        """Read one message; into `answers` if it is the answer."""
        try:
            kind, value = pickle.loads(member.connection.recv_bytes())  # noqa: S301 (from our own child)
        except (EOFError, OSError):
            raise _died(member) from None
        if kind == "progress":
            self._report(f"rank {member.rank} | {value}")
        elif kind == PONG:
            self._pulse.answer(member.rank)
        elif kind == "error":
            own = _raised(member.rank, *value)
            raise own if isinstance(own, LoadError) else self._cause(member) or own
        else:
            answers[member.rank] = value

    def _cause(self, failed: _Member) -> EngineDown | None:
        """The end of another rank, if there was one: a sum with it fails here a moment before its process is gone."""
        others = [member for member in self._members if member is not failed]
        end = time.monotonic() + MOMENT
        while others and time.monotonic() < end:
            for member in others:
                if member.process.poll() is not None:
                    return _died(member)
            time.sleep(GLANCE)
        return None


def _ready(members: list[_Member], seconds: float) -> list[_Member]:
    """Those that have something to say, or have ended, within `seconds`.

    Twice a step: multiprocessing.connection.wait would cost more than all else that is done for one sequence.
    """
    poll = select.poll()
    by_descriptor = {member.connection.fileno(): member for member in members}
    for descriptor in by_descriptor:
        poll.register(descriptor, select.POLLIN)
    return [by_descriptor[descriptor] for descriptor, _ in poll.poll(seconds * 1e3)]


_ON_CPU = {
    # Threads that spin long at OpenMP's barriers stand still when another process has their core: on 2 cores shared
    # with a busy neighbour, sleeping ones generated 4 times as many tokens a second. Some microseconds of spinning
    # cost nothing there, and on a quiet machine a text of 60 tokens takes 7.4 ms in place of 10.
    "GOMP_SPINCOUNT": "1000",
    # Bytes. By default glibc gives a layer's outputs back to the system and has them zeroed again for the next layer:
    # 10 to 17 % of an encoder's time.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
    # What oneDNN and torch's layer over it keep of each shape of a product: with 1,024 each, the defaults, a rank of
    # MiniLM that meets texts of all lengths grows from 0.5 to 1.2 GB, and computes no more of them a second.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "LRU_CACHE_CAPACITY": "128",
}
"""For ranks that compute on the CPU, unless the environment has others."""


def environment(config: EngineConfig, rank: int) -> dict[str, str]:
    """A rank's environment: what torch, DeepSpeed and OpenMP read before any of our code runs."""
    world = config.tensor_parallel
    ours = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_SIZE": world,  # without it DeepSpeed's CPU all-reduce reads out of bounds
        "OMP_NUM_THREADS": config.threads or 1,
        "MKL_NUM_THREADS": config.threads or 1,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": 1,
        "TRANSFORMERS_VERBOSITY": "error",
    }
    defaults = _ON_CPU if config.device == "cpu" else {}
    return {**defaults, **os.environ, **{name: str(value) for name, value in ours.items()}}


def _died(member: _Member) -> EngineDown:
    try:
        code = member.process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        return EngineDown(f"rank {member.rank} closed its connection")
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
    return EngineDown(f"rank {member.rank} {how}")


def _raised(rank: int, name: str, line: str) -> ServingError:
    if name == LoadError.__name__:
        return LoadError(line)
    return EngineDown(f"rank {rank}: {line}")
