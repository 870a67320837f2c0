"""FillMask: texts with a mask in, what may stand there out. It does not know how requests travel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict, Unpack, overload

from client.pipeline import AsyncPipeline, Call, Pipeline
from client.rows import Row, call, is_many, items, texts
from client.values import table, tensors

OPTIONS = table(
    ("top_k", "int32", "so many tokens, likeliest first"),
    ("truncate", "bool", "cut what is too long; otherwise it is an error"),
)
OUTPUTS = ("token_str", "score", "token", "sequence")


@dataclass(frozen=True)
class Filled:
    """One token in a mask's place."""

    token_str: str
    score: float
    token: int
    """Its number."""
    sequence: str
    """The whole text with it."""


class Options(TypedDict, total=False):
    """Keyword arguments, all optional; what is not given is as the model has it."""

    top_k: int
    truncate: bool
    timeout: float | None
    """Seconds for each request; None: the pipeline's own."""


class FillMask(Pipeline):
    """Tokens for masks, blocking."""

    @overload
    def __call__(self, text: str, **options: Unpack[Options]) -> list[Filled]: ...
    @overload
    def __call__(self, text: list[str], **options: Unpack[Options]) -> list[list[Filled]]: ...
    def __call__(self, text: Any, **options: Any) -> Any:
        """The likeliest tokens for the mask of a text, best first; of a list, those of each."""
        return self.ask(questions(text, **options), options.get("timeout"))


class AsyncFillMask(AsyncPipeline):
    """Tokens for masks for asyncio."""

    @overload
    async def __call__(self, text: str, **options: Unpack[Options]) -> list[Filled]: ...
    @overload
    async def __call__(self, text: list[str], **options: Unpack[Options]) -> list[list[Filled]]: ...
    async def __call__(self, text: Any, **options: Any) -> Any:
        """As `FillMask.__call__`."""
        return await self.ask(questions(text, **options), options.get("timeout"))


def questions(text: Any, *, timeout: float | None = None, **options: Any) -> Call[Any]:
    """The task: one row a text."""
    many = is_many(text)
    columns = {"text": texts(text if many else [text], "text")}
    return call(columns, tensors(OPTIONS, options), _filled, OUTPUTS, many)


def _filled(row: Row) -> list[Filled]:
    return items(row, Filled, lambda found: found.token >= 0)
