"""The tasks there are, and `pipeline`, which makes one for an address. It does not know what a task asks.

A new task is one file like `client.embed`, its lines in TASKS and ASYNC_TASKS, and its overloads for type checkers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, TypeVar, Unpack, overload

from client.aio import AsyncGrpcTransport, AsyncTransport
from client.channel import Endpoint, Tls
from client.classify import AsyncClassify, Classify
from client.embed import AsyncEmbed, Embed
from client.errors import InvalidInput
from client.fill_mask import AsyncFillMask, FillMask
from client.generate import AsyncGenerate, Generate
from client.limits import Limits
from client.pipeline import AsyncPipeline, Pipeline
from client.qa import AsyncQuestionAnswering, QuestionAnswering
from client.rerank import AsyncRerank, Rerank
from client.text_to_image import AsyncTextToImage, TextToImage
from client.token_classification import AsyncTokenClassification, TokenClassification
from client.transport import GrpcTransport, Transport
from client.zero_shot_image import AsyncZeroShotImage, ZeroShotImage

Kind = TypeVar("Kind")
Name = str | None

TASKS: dict[str, type[Pipeline]] = {
    "generate": Generate,
    "embed": Embed,
    "classify": Classify,
    "qa": QuestionAnswering,
    "rerank": Rerank,
    "token_classification": TokenClassification,
    "fill_mask": FillMask,
    "zero_shot_image": ZeroShotImage,
    "text_to_image": TextToImage,
}
ASYNC_TASKS: dict[str, type[AsyncPipeline]] = {
    "generate": AsyncGenerate,
    "embed": AsyncEmbed,
    "classify": AsyncClassify,
    "qa": AsyncQuestionAnswering,
    "rerank": AsyncRerank,
    "token_classification": AsyncTokenClassification,
    "fill_mask": AsyncFillMask,
    "zero_shot_image": AsyncZeroShotImage,
    "text_to_image": AsyncTextToImage,
}


class Options(TypedDict, total=False):
    """Keyword arguments of both kinds of pipeline."""

    addresses: Sequence[str]
    """Several "host:port" in place of host and port: requests go round, and on where a server is not there."""
    tls: bool | Tls
    headers: Mapping[str, str] | None
    """Sent with each request as gRPC metadata."""
    timeout: float | None
    """Seconds for a whole request; default 600."""
    idle_timeout: float
    """Seconds between two chunks of a stream; default 60."""
    retries: int
    """Tries after the first where no server could take a request, before its first byte only; default 2."""
    concurrency: int
    """How many requests of one list are under way at once; default 16."""


class Blocking(Options, total=False):
    """Keyword arguments of `pipeline`."""

    transport: Transport | None


class Waiting(Options, total=False):
    """Keyword arguments of `async_pipeline`."""

    transport: AsyncTransport | None


@overload
def pipeline(
    task: Literal["generate"], name: Name = None, host: str = "localhost", port: int = 8001, **options: Unpack[Blocking]
) -> Generate: ...
@overload
def pipeline(
    task: Literal["embed"], name: Name = None, host: str = "localhost", port: int = 8001, **options: Unpack[Blocking]
) -> Embed: ...
@overload
def pipeline(
    task: Literal["classify"], name: Name = None, host: str = "localhost", port: int = 8001, **options: Unpack[Blocking]
) -> Classify: ...
@overload
def pipeline(
    task: Literal["qa"], name: Name = None, host: str = "localhost", port: int = 8001, **options: Unpack[Blocking]
) -> QuestionAnswering: ...
@overload
def pipeline(
    task: Literal["rerank"], name: Name = None, host: str = "localhost", port: int = 8001, **options: Unpack[Blocking]
) -> Rerank: ...
@overload
def pipeline(
    task: Literal["token_classification"],
    name: Name = None,
    host: str = "localhost",
    port: int = 8001,
    **options: Unpack[Blocking],
) -> TokenClassification: ...
@overload
def pipeline(
    task: Literal["fill_mask"],
    name: Name = None,
    host: str = "localhost",
    port: int = 8001,
    **options: Unpack[Blocking],
) -> FillMask: ...
@overload
def pipeline(
    task: Literal["zero_shot_image"],
    name: Name = None,
    host: str = "localhost",
    port: int = 8001,
    **options: Unpack[Blocking],
) -> ZeroShotImage: ...
@overload
def pipeline(
    task: Literal["text_to_image"],
    name: Name = None,
    host: str = "localhost",
    port: int = 8001,
    **options: Unpack[Blocking],
) -> TextToImage: ...
def pipeline(
    task: str, name: Name = None, host: str = "localhost", port: int = 8001, *, transport: Any = None, **options: Any
) -> Any:
    """A task of the model `name` (default: the task's own name) at Triton's gRPC port; connects when first used.

    `Options` tells what else may be given.
    """
    kind = _find(TASKS, task)
    endpoint, limits, concurrency = _settings(host, port, **options)
    return kind(name or task, transport or GrpcTransport(endpoint, kind.streamed), limits, concurrency)


@overload
def async_pipeline(
    task: Literal["generate"], name: Name = None, host: str = "localhost", port: int = 8001, **options: Unpack[Waiting]
) -> AsyncGenerate: ...
@overload
def async_pipeline(
    task: Literal["embed"], name: Name = None, host: str = "localhost", port: int = 8001, **options: Unpack[Waiting]
) -> AsyncEmbed: ...
@overload
def async_pipeline(
    task: Literal["classify"], name: Name = None, host: str = "localhost", port: int = 8001, **options: Unpack[Waiting]
) -> AsyncClassify: ...
@overload
def async_pipeline(
    task: Literal["qa"], name: Name = None, host: str = "localhost", port: int = 8001, **options: Unpack[Waiting]
) -> AsyncQuestionAnswering: ...
@overload
def async_pipeline(
    task: Literal["rerank"], name: Name = None, host: str = "localhost", port: int = 8001, **options: Unpack[Waiting]
) -> AsyncRerank: ...
@overload
def async_pipeline(
    task: Literal["token_classification"],
    name: Name = None,
    host: str = "localhost",
    port: int = 8001,
    **options: Unpack[Waiting],
) -> AsyncTokenClassification: ...
@overload
def async_pipeline(
    task: Literal["fill_mask"], name: Name = None, host: str = "localhost", port: int = 8001, **options: Unpack[Waiting]
) -> AsyncFillMask: ...
@overload
def async_pipeline(
    task: Literal["zero_shot_image"],
    name: Name = None,
    host: str = "localhost",
    port: int = 8001,
    **options: Unpack[Waiting],
) -> AsyncZeroShotImage: ...
@overload
def async_pipeline(
    task: Literal["text_to_image"],
    name: Name = None,
    host: str = "localhost",
    port: int = 8001,
    **options: Unpack[Waiting],
) -> AsyncTextToImage: ...
def async_pipeline(
    task: str, name: Name = None, host: str = "localhost", port: int = 8001, *, transport: Any = None, **options: Any
) -> Any:
    """`pipeline` for asyncio."""
    kind = _find(ASYNC_TASKS, task)
    endpoint, limits, concurrency = _settings(host, port, **options)
    return kind(name or task, transport or AsyncGrpcTransport(endpoint, kind.streamed), limits, concurrency)


def _settings(
    host: str,
    port: int,
    *,
    addresses: Sequence[str] = (),
    tls: bool | Tls = False,
    headers: Mapping[str, str] | None = None,
    timeout: float | None = 600.0,
    idle_timeout: float = 60.0,
    retries: int = 2,
    concurrency: int = 16,
) -> tuple[Endpoint, Limits, int]:
    """Where to ask, how long and how often, and how much at once."""
    return Endpoint.of(host, port, addresses, tls, headers), Limits(timeout, idle_timeout, retries), concurrency


def _find(tasks: Mapping[str, Kind], task: str) -> Kind:
    if task not in tasks:
        raise InvalidInput(f"there is no task {task!r}; available: {', '.join(tasks)}")
    return tasks[task]
