"""Health: whether a launched server can serve, over HTTP: `GET /health` gives 200, or 503 and the reason in a line.

More than Triton's own readiness, which in 2.51 stays true while a model's ranks restart, after they have failed for
good, and when its stub was killed. It does not check what models answer.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer

import psutil

from backend.launcher.states import States
from backend.launcher.tritonserver import Ports

KEPT = 1.0
"""Seconds for which a finding holds: looking costs tens of milliseconds."""
SILENCE = 15.0
"""Seconds without a push of its metrics, one a second, after which a stub counts as hung."""
_SECONDS = 5
BEAT = re.compile(r'^tritonspeed_heartbeat_seconds\{[^}]*model="([^"]*)"[^}]*\} ([\d.e+]+)$', re.M)


def ready(ports: Ports) -> bool:
    """Whether every model that was to be loaded is; Triton opens its ports once that is decided."""
    return _read(f"http://{ports.local}:{ports.http}/v2/health/ready") is not None


class Health:
    """Of the server below this process."""

    def __init__(self, ports: Ports, repository: Path, states: States) -> None:
        self._ports, self._repository, self._states = ports, repository, states
        self._looking = threading.Lock()
        self._found: str | None = "starting"
        self._until = 0.0

    def trouble(self) -> str | None:
        """What is wrong, if anything; any thread may ask."""
        with self._looking:
            if time.monotonic() > self._until:
                self._found = self._look()
                self._until = time.monotonic() + KEPT
            return self._found

    def _look(self) -> str | None:
        if not ready(self._ports):
            return "tritonserver is not ready"
        loaded = self._states.loaded
        for model in [*loaded, *self._states.lost]:
            if said := self._states.trouble(model):
                return f"model {model}: {said}"
        stubs = _stubs()
        for model in filter(self._is_python, loaded):
            if not any(f"/{model}/" in argument for argument in stubs):
                return f"model {model}: its process is gone or stopped"
        return self._silent(loaded)

    def _silent(self, loaded: list[str]) -> str | None:
        """By what stubs push into Triton's metrics, where it has any."""
        text = _read(f"http://{self._ports.local}:{self._ports.metrics}/metrics") or ""
        for model, beat in BEAT.findall(text):
            if model in loaded and 0 < float(beat) < time.time() - SILENCE:
                return f"model {model}: its process gives no sign of life"
        return None

    def _is_python(self, model: str) -> bool:
        try:
            return '"python"' in (self._repository / model / "config.pbtxt").read_text()
        except OSError:
            return False


def _read(url: str) -> str | None:
    """The answer's text; None unless its status is 200."""
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS) as answer:  # noqa: S310 our own http address
            return str(answer.read().decode()) if answer.status == 200 else None
    except (urllib.error.URLError, OSError, ValueError):
        return None


def _stubs() -> list[str]:
    """Command-line words of the stubs that run: the first names the model's file."""
    found: list[str] = []
    for process in psutil.Process(os.getpid()).children(recursive=True):
        try:
            if is_stub(process):
                found += process.cmdline()
        except psutil.NoSuchProcess:
            continue
    return found


def is_stub(process: psutil.Process) -> bool:
    """Whether it is one that runs: neither ended nor stopped."""
    try:
        still = (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED)
        return process.name().startswith("triton_python") and process.status() not in still
    except psutil.NoSuchProcess:
        return False


@contextmanager
def served(health: Health, host: str, port: int) -> Iterator[None]:
    """Answers at `/health` meanwhile."""

    class Answer(BaseHTTPRequestHandler):
        timeout = _SECONDS  # for those that send nothing
        server_version, sys_version = "tritonspeed", ""

        def do_GET(self) -> None:
            trouble = health.trouble() if self.path == "/health" else "only /health is here"
            status = 404 if self.path != "/health" else 503 if trouble else 200
            text = f"{trouble or 'ok'}\n".encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text)

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            """Nothing: probes come every few seconds."""

    class Server(ThreadingTCPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        allow_reuse_address = daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A probe that went away is nobody's fault."""

    with Server((host, port), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True, name="health")
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
