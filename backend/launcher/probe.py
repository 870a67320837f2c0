"""Is a launched server well? `python -m backend.launcher.probe [GRPC_PORT]`: status 0, or 1 with the reason in a line.

It asks the launcher's own `/health`; what is looked at is health.py's business.
"""

from __future__ import annotations

import sys
import urllib.error
import urllib.request

from client import local

_SECONDS = 8


def trouble(grpc_port: int) -> str | None:
    """What is wrong with the server of a port, if anything."""
    server = local.find(grpc_port)
    if server is None:
        return f"no server on port {grpc_port}"
    try:
        with urllib.request.urlopen(f"http://{server.host}:{server.health_port}/health", timeout=_SECONDS):
            return None
    except urllib.error.HTTPError as error:
        with error:
            return error.read(2000).decode(errors="replace").strip() or f"health answers {error.code}"
    except (urllib.error.URLError, OSError) as error:
        return f"the launcher of port {grpc_port} does not answer: {error}"


def main() -> int:
    """For HEALTHCHECK and people."""
    wrong = trouble(int(sys.argv[1]) if len(sys.argv) > 1 else 8001)
    if wrong:
        print(wrong, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
