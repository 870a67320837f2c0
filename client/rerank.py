"""Rerank: a query and texts in, the texts by how well they fit out. It does not know how requests travel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

from client.errors import InvalidInput, ServerError
from client.pipeline import AsyncPipeline, Call, Pipeline
from client.rows import Row, call, items, listed, texts
from client.tensors import text
from client.values import table, tensors

OPTIONS = table(
    ("top_k", "int32", "so many texts, best first; otherwise all"),
    ("raw_scores", "bool", "the model's own scores, not between 0 and 1"),
    ("truncate", "bool", "cut what is too long; otherwise it is an error"),
)
OUTPUTS = ("index", "score")


@dataclass(frozen=True)
class Ranked:
    """One text of a ranking."""

    index: int
    """Its place in the list that was given."""
    score: float
    text: str


class Options(TypedDict, total=False):
    """Keyword arguments, all optional; what is not given is as the model has it."""

    top_k: int
    raw_scores: bool
    truncate: bool
    timeout: float | None
    """Seconds for the request; None: the pipeline's own."""


class Rerank(Pipeline):
    """Rankings of texts, blocking."""

    def __call__(self, query: str, texts: list[str], **options: Unpack[Options]) -> list[Ranked]:
        """The texts that fit the query best, best first."""
        return self.ask(questions(query, texts, **options), options.get("timeout"))


class AsyncRerank(AsyncPipeline):
    """Rankings of texts for asyncio."""

    async def __call__(self, query: str, texts: list[str], **options: Unpack[Options]) -> list[Ranked]:
        """As `Rerank.__call__`."""
        return await self.ask(questions(query, texts, **options), options.get("timeout"))


def questions(query: str, given: Any, *, timeout: float | None = None, **options: Any) -> Call[list[Ranked]]:
    """The task: one row, with all texts; none are asked of nobody."""
    candidates = listed(given, "texts")
    if not candidates:
        raise InvalidInput("texts must not be empty")
    columns = {"query": [[text(query, "query")]], "texts": [[each for (each,) in texts(candidates, "text")]]}

    def read(row: Row) -> list[Ranked]:
        if wrong := [index for index in row["index"] if not -1 <= index < len(candidates)]:
            raise ServerError(f"the server ranked text {wrong[0]} of {len(candidates)}")
        return items(row, lambda index, score: Ranked(index, score, candidates[index]), lambda found: found.index >= 0)

    return call(columns, tensors(OPTIONS, options), read, OUTPUTS, many=False)
