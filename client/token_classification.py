"""TokenClassification: texts in, entities with their places out. It does not know how requests travel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict, Unpack, overload

from client.pipeline import AsyncPipeline, Call, Pipeline
from client.rows import Row, call, is_many, items, texts
from client.values import table, tensors

OPTIONS = table(
    ("aggregation", "string", "how tokens become entities: none, simple, first, average or max"),
    ("truncate", "bool", "cut what is too long; otherwise it is an error"),
)
OUTPUTS = ("entity", "score", "word", "start", "end")


@dataclass(frozen=True)
class Entity:
    """One entity in a text."""

    entity: str
    score: float
    word: str
    start: int
    """Characters of the text before it."""
    end: int


class Options(TypedDict, total=False):
    """Keyword arguments, all optional; what is not given is as the model has it."""

    aggregation: str
    truncate: bool
    timeout: float | None
    """Seconds for each request; None: the pipeline's own."""


class TokenClassification(Pipeline):
    """Entities in texts, blocking."""

    @overload
    def __call__(self, text: str, **options: Unpack[Options]) -> list[Entity]: ...
    @overload
    def __call__(self, text: list[str], **options: Unpack[Options]) -> list[list[Entity]]: ...
    def __call__(self, text: Any, **options: Any) -> Any:
        """The entities of a text in their order; of a list, those of each."""
        return self.ask(questions(text, **options), options.get("timeout"))


class AsyncTokenClassification(AsyncPipeline):
    """Entities in texts for asyncio."""

    @overload
    async def __call__(self, text: str, **options: Unpack[Options]) -> list[Entity]: ...
    @overload
    async def __call__(self, text: list[str], **options: Unpack[Options]) -> list[list[Entity]]: ...
    async def __call__(self, text: Any, **options: Any) -> Any:
        """As `TokenClassification.__call__`."""
        return await self.ask(questions(text, **options), options.get("timeout"))


def questions(text: Any, *, timeout: float | None = None, **options: Any) -> Call[Any]:
    """The task: one row a text."""
    many = is_many(text)
    columns = {"text": texts(text if many else [text], "text")}
    return call(columns, tensors(OPTIONS, options), _entities, OUTPUTS, many)


def _entities(row: Row) -> list[Entity]:
    return items(row, Entity, lambda found: found.start >= 0)
