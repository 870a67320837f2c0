"""The tasks there are, and `pipeline`, which makes one for an address. It does not know what a task asks.

A new task is one file like `client.generate`, and its line in TASKS and ASYNC_TASKS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeVar

from client.aio import AsyncGrpcTransport, AsyncTransport
from client.channel import Endpoint, Tls
from client.errors import InvalidInput
from client.generate import AsyncGenerate, Generate
from client.limits import Limits
from client.pipeline import AsyncPipeline, Pipeline
from client.transport import GrpcTransport, Transport

Kind = TypeVar("Kind")

TASKS: dict[str, Callable[[str, Transport, Limits, int], Pipeline]] = {"generate": Generate}
ASYNC_TASKS: dict[str, Callable[[str, AsyncTransport, Limits, int], AsyncPipeline]] = {"generate": AsyncGenerate}


def pipeline(
    task: Literal["generate"],
    name: str | None = None,
    host: str = "localhost",
    port: int = 8001,
    *,
    addresses: Sequence[str] = (),
    tls: bool | Tls = False,
    headers: Mapping[str, str] | None = None,
    timeout: float | None = 600.0,
    idle_timeout: float = 60.0,
    retries: int = 2,
    concurrency: int = 16,
    transport: Transport | None = None,
) -> Generate:
    """A task of the model `name` (default: the task's own name) at Triton's gRPC port; connects when first used.

    `addresses` ("host:port", several) replace host and port: requests go round, and on to the next where a server is
    not there. `timeout` holds for a whole request, `idle_timeout` between two chunks of a stream (seconds). `retries`
    more tries follow where no server could take a request, before its first byte only. `concurrency` bounds the
    requests of one list. `headers` go with each request as gRPC metadata.
    """
    kind = _find(TASKS, task)
    limits = Limits(timeout, idle_timeout, retries)
    found = transport or GrpcTransport(Endpoint.of(host, port, addresses, tls, headers))
    return kind(name or task, found, limits, concurrency)  # type: ignore[return-value]


def async_pipeline(
    task: Literal["generate"],
    name: str | None = None,
    host: str = "localhost",
    port: int = 8001,
    *,
    addresses: Sequence[str] = (),
    tls: bool | Tls = False,
    headers: Mapping[str, str] | None = None,
    timeout: float | None = 600.0,
    idle_timeout: float = 60.0,
    retries: int = 2,
    concurrency: int = 16,
    transport: AsyncTransport | None = None,
) -> AsyncGenerate:
    """`pipeline` for asyncio."""
    kind = _find(ASYNC_TASKS, task)
    limits = Limits(timeout, idle_timeout, retries)
    found = transport or AsyncGrpcTransport(Endpoint.of(host, port, addresses, tls, headers))
    return kind(name or task, found, limits, concurrency)  # type: ignore[return-value]


def _find(tasks: Mapping[str, Kind], task: str) -> Kind:
    if task not in tasks:
        raise InvalidInput(f"there is no task {task!r}; available: {', '.join(tasks)}")
    return tasks[task]
