"""Which servers run on this machine: one small file each, written by the launcher. It does not start or ask any."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from client.errors import InvalidInput


@dataclass(frozen=True)
class Server:
    """A running server; `pid` is its launcher's."""

    pid: int
    grpc_port: int
    http_port: int
    repository: str
    explicit: bool
    health_port: int = 0
    """Where the launcher says over HTTP whether all is well; 0: nowhere."""
    host: str = "127.0.0.1"
    """By which this machine reaches it."""


def folder() -> Path:
    """Where the files are: $TRITONSPEED_RUN, else one of this user's own in the folder for temporary files."""
    named = os.environ.get("TRITONSPEED_RUN")
    return Path(named) if named else Path(tempfile.gettempdir()) / f"tritonspeed-{os.getuid()}"


def find(grpc_port: int) -> Server | None:
    """The server of a port; None where none was announced, or its launcher is gone."""
    path = folder() / f"{grpc_port}.json"
    try:
        if path.stat().st_uid != os.getuid():  # another user's word about where to write counts nothing
            return None
        server = Server(**json.loads(path.read_text(encoding="utf-8")))
        os.kill(server.pid, 0)
    except (OSError, ValueError, TypeError, OverflowError):
        return None
    return server


def announce(
    grpc_port: int, http_port: int, repository: Path, explicit: bool, health_port: int = 0, host: str = "127.0.0.1"
) -> Server:
    """Tell this user's clients of a server that this process launched."""
    server = Server(os.getpid(), grpc_port, http_port, str(repository.absolute()), explicit, health_port, host)
    fresh = _own_folder() / f".{grpc_port}.{server.pid}"
    fresh.write_text(json.dumps(asdict(server)), encoding="utf-8")
    fresh.replace(folder() / f"{grpc_port}.json")
    return server


def withdraw(grpc_port: int) -> None:
    """Take back what this process announced; what another one has announced since stays."""
    server = find(grpc_port)
    if server and server.pid == os.getpid():
        (folder() / f"{grpc_port}.json").unlink(missing_ok=True)


def _own_folder() -> Path:
    path = folder()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.is_symlink() or path.stat().st_uid != os.getuid():
        raise InvalidInput(f"{path} belongs to someone else; set TRITONSPEED_RUN to a folder of your own")
    return path
