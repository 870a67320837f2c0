"""This project's contenders: the engine in the bench's process, and a tritonserver of its own with client processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Mapping
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from backend.errors import DeadlineExceeded, Overloaded
from measuring.figures import Trace
from measuring.remote import Remote
from measuring.workloads import Request

ROOT = Path(__file__).resolve().parents[2]
READY_SECONDS = 1800
QUIET_SECONDS = 600
"""Without a token from anyone: something hangs."""


class Engine:
    """The engine without Triton. One thread opens and reads all streams."""

    def __init__(self, parameters: Mapping[str, str]) -> None:
        from backend.config import EngineConfig
        from backend.generation.engine import Engine as Served

        self._engine = Served(EngineConfig.from_parameters(parameters), report=lambda line: None)
        self._engine.start()

    def run(self, requests: list[Request], clients: int) -> list[Trace]:
        """Traces in the order of the requests."""
        return _Round(self._engine, requests, clients).run()

    def close(self) -> None:
        self._engine.close()


class _Round:
    """One run of requests on an engine."""

    def __init__(self, engine: Any, requests: list[Request], clients: int) -> None:
        self._engine, self._requests, self._clients = engine, requests, clients
        self._traces = [Trace() for _ in requests]
        self._open: dict[int, Any] = {}
        self._news: SimpleQueue[int] = SimpleQueue()
        self._next = 0

    def run(self) -> list[Trace]:
        self._start = time.perf_counter()
        while (wait := self._begin()) < QUIET_SECONDS or self._open:
            try:
                self._read(self._news.get(timeout=wait))
            except Empty:
                if wait == QUIET_SECONDS:
                    raise RuntimeError(f"no token for {QUIET_SECONDS} s") from None
        return self._traces

    def _begin(self) -> float:
        """Open what is due; seconds until the next is, QUIET_SECONDS where only those that are open can tell."""
        while self._next < len(self._requests):
            due = self._start + self._requests[self._next].at - time.perf_counter()
            if self._clients and len(self._open) >= self._clients:
                break
            if not self._clients and due > 0:
                return min(due, QUIET_SECONDS - 1)
            self._send(self._next)
            self._next += 1
        return QUIET_SECONDS

    def _send(self, number: int) -> None:
        from backend.generation.prompt import Prompt
        from backend.generation.sequence import SamplingParams

        request, trace = self._requests[number], self._traces[number]
        trace.start = time.perf_counter() - self._start if self._clients else request.at
        prompt = Prompt(array("i", request.ids), SamplingParams(max_tokens=request.output, temperature=0.0))
        try:
            self._open[number] = self._engine.open([prompt], lambda ended: self._news.put(number))
        except Overloaded as error:
            trace.refused = repr(error)

    def _read(self, number: int) -> None:
        if (stream := self._open.get(number)) is None:
            return  # all was read at the bell before
        now, trace = time.perf_counter() - self._start, self._traces[number]
        try:
            trace.arrivals += [(now, len(delta.token_ids)) for delta in stream.take()]
        except (Overloaded, DeadlineExceeded) as error:
            trace.refused = repr(error)
        if stream.done or trace.refused:
            self._engine.leave(self._open.pop(number))


class Server:
    """A tritonserver of its own, asked over gRPC by some processes of this project's client."""

    def __init__(self, parameters: Mapping[str, str], processes: int = 0) -> None:
        self.port, http, metrics = free_ports(3)
        command = [sys.executable, "-m", "backend.server", "--port", self.port]
        command += ["--http-port", http, "--metrics-port", metrics]
        for key, value in parameters.items():
            own = key in ("model", "tensor_parallel", "dtype")
            command += [f"--{key.replace('_', '-')}", value] if own else ["--set", f"{key}={value}"]
        self._log = tempfile.NamedTemporaryFile("w+", prefix="bench-server-", suffix=".log")  # noqa: SIM115 (open as long as the server)
        self._process = subprocess.Popen(list(map(str, command)), stdout=self._log, stderr=subprocess.STDOUT, cwd=ROOT)
        self._await_ready()
        count = processes or max(1, min(8, len(os.sched_getaffinity(0)) // 2))
        self._clients = [Remote("measuring.stream_client", str(self.port)) for _ in range(count)]
        for each in self._clients:
            each.receive()

    def _await_ready(self) -> None:
        from client import pipeline

        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with pipeline("generate", port=self.port, timeout=60) as pipe:
                    pipe([1, 2, 3], max_tokens=1)
                return
            except Exception:
                time.sleep(0.5)
        self._process.kill()
        raise RuntimeError(Path(self._log.name).read_text()[-4000:] + "\nthe server did not become ready")

    def run(self, requests: list[Request], clients: int) -> list[Trace]:
        """Traces in the order of the requests, which the client processes take in turn."""
        count = min(len(self._clients), clients or len(requests), len(requests))
        start = (
            time.perf_counter() + 0.1 + 1e-6 * sum(len(request.ids) for request in requests)
        )  # all have theirs by then
        for number, each in enumerate(self._clients[:count]):
            share = (clients + count - 1 - number) // count
            each.send((start, share, requests[number::count]))
        traces = [Trace() for _ in requests]
        for number, each in enumerate(self._clients[:count]):
            traces[number::count] = each.receive()
        return traces

    def memory(self) -> dict[str, float]:
        """MiB of private memory (USS) of tritonserver, its stub and the ranks."""
        import psutil

        names = {"tritonserver": "tritonserver", "python_backend_stub": "stub", "backend.ranks.rank": "rank"}
        found: dict[str, float] = {}
        for process in psutil.Process(self._process.pid).children(recursive=True):
            line = " ".join(process.cmdline()[:4])
            if name := next((name for key, name in reversed(names.items()) if key in line), None):
                label = name if name not in found else f"{name} {sum(key.startswith(name) for key in found)}"
                found[label] = process.memory_full_info().uss / 2**20
        return found

    def close(self) -> None:
        for each in self._clients:
            each.close()
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports
