"""Classify: texts, or pairs of texts, in, labels with scores out. It does not know how requests travel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias, TypedDict, Unpack, overload

from client.errors import InvalidInput
from client.pipeline import AsyncPipeline, Call, Pipeline
from client.rows import Columns, Row, call, is_many, items, texts
from client.values import table, tensors

Text: TypeAlias = str | tuple[str, str]
"""A text, or a pair as models for entailment and the like take it."""
Texts: TypeAlias = list[str] | list[tuple[str, str]]

OPTIONS = table(
    ("top_k", "int32", "so many labels, best first; otherwise all"),
    ("raw_scores", "bool", "the model's own scores, neither softmax nor sigmoid"),
    ("truncate", "bool", "cut what is too long; otherwise it is an error"),
)
OUTPUTS = ("label", "score")


@dataclass(frozen=True)
class Label:
    """One label of a text or an image."""

    label: str
    score: float


class Options(TypedDict, total=False):
    """Keyword arguments, all optional; what is not given is as the model has it."""

    top_k: int
    raw_scores: bool
    truncate: bool
    timeout: float | None
    """Seconds for each request; None: the pipeline's own."""


class Classify(Pipeline):
    """Labels of texts, blocking."""

    @overload
    def __call__(self, text: Text, **options: Unpack[Options]) -> list[Label]: ...
    @overload
    def __call__(self, text: Texts, **options: Unpack[Options]) -> list[list[Label]]: ...
    def __call__(self, text: Any, **options: Any) -> Any:
        """The labels of a text or a (text, text_pair), best first; of a list, those of each."""
        return self.ask(questions(text, **options), options.get("timeout"))


class AsyncClassify(AsyncPipeline):
    """Labels of texts for asyncio."""

    @overload
    async def __call__(self, text: Text, **options: Unpack[Options]) -> list[Label]: ...
    @overload
    async def __call__(self, text: Texts, **options: Unpack[Options]) -> list[list[Label]]: ...
    async def __call__(self, text: Any, **options: Any) -> Any:
        """As `Classify.__call__`."""
        return await self.ask(questions(text, **options), options.get("timeout"))


def questions(text: Any, *, timeout: float | None = None, **options: Any) -> Call[Any]:
    """The task: one row a text or pair."""
    many = is_many(text)
    return call(_columns([*text] if many else [text]), tensors(OPTIONS, options), labels, OUTPUTS, many)


def labels(row: Row) -> list[Label]:
    """A row's labels; the filling has none."""
    return items(row, Label, lambda found: bool(found.label))


def _columns(given: list[Any]) -> Columns:
    pairs = [each for each in given if isinstance(each, tuple)]
    if any(len(pair) != 2 for pair in pairs):
        raise InvalidInput("a pair must be a tuple of two texts: (text, text_pair)")
    if not pairs:
        return {"text": texts(given, "text")}
    if len(pairs) < len(given):
        raise InvalidInput("give texts or pairs, not both in one list")
    return {
        "text": texts([pair[0] for pair in pairs], "text"),
        "text_pair": texts([pair[1] for pair in pairs], "text_pair"),
    }
