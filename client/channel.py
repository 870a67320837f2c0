"""How a server is reached: its addresses, TLS and channel options. It does not know what is asked there."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from client.errors import InvalidInput

Metadata = tuple[tuple[str, str], ...]

_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_retries", 0),  # ours know which errors may be retried
    ("grpc.initial_reconnect_backoff_ms", 100),  # a server that restarts is found again soon
    ("grpc.max_reconnect_backoff_ms", 2000),
)


@dataclass(frozen=True)
class Tls:
    """PEM files: whom to trust (default: the system's roots), and who we are where the server asks for it."""

    ca: str | Path | None = None
    certificate: str | Path | None = None
    key: str | Path | None = None
    server_name: str = ""
    """The name in the server's certificate, where it differs from the host."""

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises InvalidInput naming the file that cannot be read."""
        return grpc.ssl_channel_credentials(_pem(self.ca), _pem(self.key), _pem(self.certificate))


@dataclass(frozen=True)
class Endpoint:
    """One or more servers of the same models; requests go round and pass over those that do not answer."""

    addresses: tuple[str, ...]
    tls: Tls | None = None
    metadata: Metadata = ()

    @classmethod
    def of(
        cls,
        host: str = "localhost",
        port: int = 8001,
        addresses: Sequence[str] = (),
        tls: bool | Tls = False,
        headers: Mapping[str, str] | None = None,
    ) -> Endpoint:
        """From what a caller gives; `addresses` ("host:port" each) replace host and port."""
        if isinstance(addresses, str):
            raise InvalidInput("addresses must be a list of 'host:port', not one string")
        given = tuple(addresses) or (join(host, port),)
        if wrong := [address for address in given if not address.rpartition(":")[2].isdecimal()]:
            raise InvalidInput(f"address {wrong[0]!r} must be 'host:port'")
        metadata = tuple((name.lower(), value) for name, value in (headers or {}).items())
        return cls(given, (Tls() if tls is True else tls) or None, metadata)

    def options(self, address: str) -> list[tuple[str, int | str]]:
        """Channel arguments; a proxy from the environment is never used for this machine itself."""
        options: list[tuple[str, int | str]] = [*_OPTIONS]
        if is_local(address.rpartition(":")[0]):
            options.append(("grpc.enable_http_proxy", 0))
        if self.tls and self.tls.server_name:
            options.append(("grpc.ssl_target_name_override", self.tls.server_name))
        return options


def join(host: str, port: int) -> str:
    """An address as gRPC takes it, with brackets where the host is an IPv6 address."""
    if isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 65536:
        raise InvalidInput(f"port must be from 1 to 65535, not {port!r}")
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def is_local(host: str) -> bool:
    """Whether a host name means this machine's loopback."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def connect(endpoint: Endpoint, address: str) -> grpc.Channel:
    """A channel that connects at its first call."""
    if endpoint.tls:
        return grpc.secure_channel(address, endpoint.tls.credentials(), endpoint.options(address))
    return grpc.insecure_channel(address, endpoint.options(address))


def connect_async(endpoint: Endpoint, address: str) -> grpc.aio.Channel:
    """The same for the running event loop."""
    if endpoint.tls:
        return grpc.aio.secure_channel(address, endpoint.tls.credentials(), endpoint.options(address))
    return grpc.aio.insecure_channel(address, endpoint.options(address))


def _pem(path: str | Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidInput(f"cannot read the TLS file {str(path)!r}: {error.strerror}") from None
