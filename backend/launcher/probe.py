"""Is a launched server well? `python -m backend.launcher.probe [GRPC_PORT]`: status 0, or 1 with the reason in a line.

More than Triton's readiness, which stays true when a model's stub was killed. It does not check what models answer.
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request
from pathlib import Path

import psutil

from client import local

_SECONDS = 5


def trouble(grpc_port: int) -> str | None:
    """What is wrong with the server of a port, if anything."""
    server = local.find(grpc_port)
    if server is None:
        return f"no server on port {grpc_port}"
    models = [path for path in sorted(Path(server.repository).iterdir()) if (path / "config.pbtxt").is_file()]
    paths = ["/v2/health/ready", *(f"/v2/models/{model.name}/ready" for model in models)]
    for path in paths:
        if not _answers(f"http://127.0.0.1:{server.http_port}{path}"):
            return f"not ready: {path}"
    running = _stub_arguments(server.pid)
    for model in models:
        if _python(model) and not any(f"/{model.name}/" in argument for argument in running):
            return f"the process of model {model.name} is gone"
    return None


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS) as answer:  # noqa: S310 our own http address
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _stub_arguments(launcher: int) -> list[str]:
    """Command-line words of the living stubs: the first names the model's file."""
    stubs = [process for process in psutil.Process(launcher).children(recursive=True) if _is_stub(process)]
    return [word for stub in stubs for word in stub.cmdline()]


def _is_stub(process: psutil.Process) -> bool:
    try:
        return process.name().startswith("triton_python") and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _python(model: Path) -> bool:
    return '"python"' in (model / "config.pbtxt").read_text()


def main() -> int:
    """For HEALTHCHECK and people."""
    wrong = trouble(int(sys.argv[1]) if len(sys.argv) > 1 else 8001)
    if wrong:
        print(wrong, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
