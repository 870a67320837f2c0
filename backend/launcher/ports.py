"""Which ports are free. It does not know who holds one that is not."""

from __future__ import annotations

import socket

from backend.errors import LoadError


def require_free(host: str, wanted: dict[str, int]) -> dict[str, int]:
    """Port by option, 0 replaced by any free one; LoadError names the option whose port is taken."""
    sockets: list[socket.socket] = []
    try:
        return {option: _bind(host, option, port, sockets) for option, port in wanted.items()}
    finally:
        for bound in sockets:
            bound.close()


def _bind(host: str, option: str, port: int, sockets: list[socket.socket]) -> int:
    if not 0 <= port < 1 << 16:  # getaddrinfo would take it modulo 65536
        raise LoadError(f"port {port} ({option}) does not exist: 0 to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        probe = socket.socket(family, kind)
        sockets.append(probe)
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: TIME_WAIT is no obstacle
        probe.bind(address)
    except OSError as error:
        raise LoadError(
            f"port {port} ({option}) on {host} cannot be used: {str(error.strerror or error).lower()}"
        ) from None
    return int(probe.getsockname()[1])
