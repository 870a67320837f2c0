"""QuestionAnswering: questions and contexts in, spans of the contexts out. It does not know how requests travel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypedDict, Unpack, overload

from client.errors import InvalidInput, ServerError
from client.pipeline import AsyncPipeline, Call, Pipeline
from client.rows import Row, call, is_many, items, texts
from client.values import table, tensors

OPTIONS = table(
    ("top_k", "int32", "so many answers, best first"),
    ("doc_stride", "int32", "tokens that two parts of a long context share"),
    ("max_answer_len", "int32", "tokens of an answer at most"),
    ("max_seq_len", "int32", "tokens of a question and one part of its context at most"),
    ("handle_impossible_answer", "bool", "an empty answer is one too"),
)
OUTPUTS = ("answer", "score", "start", "end")


@dataclass(frozen=True)
class Answer:
    """A span of a context."""

    answer: str
    score: float
    start: int
    """Characters of the context before it."""
    end: int


class Options(TypedDict, total=False):
    """Keyword arguments but top_k, all optional."""

    doc_stride: int
    max_answer_len: int
    max_seq_len: int
    handle_impossible_answer: bool
    timeout: float | None
    """Seconds for each request; None: the pipeline's own."""


class QuestionAnswering(Pipeline):
    """Answers to questions from a context, blocking."""

    # The overlap is meant: two single texts are the first two's.
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, question: str, context: str, *, top_k: int, **options: Unpack[Options]
    ) -> list[Answer]: ...
    @overload
    def __call__(  # type: ignore[overload-overlap]
        self, question: str, context: str, **options: Unpack[Options]
    ) -> Answer: ...
    @overload
    def __call__(
        self, question: str | list[str], context: str | list[str], *, top_k: int, **options: Unpack[Options]
    ) -> list[list[Answer]]: ...
    @overload
    def __call__(
        self, question: str | list[str], context: str | list[str], **options: Unpack[Options]
    ) -> list[Answer]: ...
    def __call__(self, question: Any, context: Any, **options: Any) -> Any:
        """The best answer, or with `top_k` a list of the best ones.

        Question, context or both may be lists: the result is one then; a single one goes with each of the others.
        """
        return self.ask(questions(question, context, **options), options.get("timeout"))


class AsyncQuestionAnswering(AsyncPipeline):
    """Answers to questions from a context for asyncio."""

    @overload
    async def __call__(  # type: ignore[overload-overlap]
        self, question: str, context: str, *, top_k: int, **options: Unpack[Options]
    ) -> list[Answer]: ...
    @overload
    async def __call__(  # type: ignore[overload-overlap]
        self, question: str, context: str, **options: Unpack[Options]
    ) -> Answer: ...
    @overload
    async def __call__(
        self, question: str | list[str], context: str | list[str], *, top_k: int, **options: Unpack[Options]
    ) -> list[list[Answer]]: ...
    @overload
    async def __call__(
        self, question: str | list[str], context: str | list[str], **options: Unpack[Options]
    ) -> list[Answer]: ...
    async def __call__(self, question: Any, context: Any, **options: Any) -> Any:
        """As `QuestionAnswering.__call__`."""
        return await self.ask(questions(question, context, **options), options.get("timeout"))


def questions(question: Any, context: Any, *, timeout: float | None = None, **options: Any) -> Call[Any]:
    """The task: one row a question with its context."""
    asked, given, many = _pairs(question, context)
    columns = {"question": texts(asked, "question"), "context": texts(given, "context")}
    read = _best if options.get("top_k") is None else _answers
    return call(columns, tensors(OPTIONS, options), read, OUTPUTS, many)


def _pairs(question: Any, context: Any) -> tuple[list[Any], list[Any], bool]:
    """As many questions as contexts, and whether lists were given."""
    counts = {len(given) for given in (question, context) if is_many(given)}
    if len(counts) > 1:
        raise InvalidInput(f"there are {len(question)} questions but {len(context)} contexts")
    asked, given = ([*each] if is_many(each) else [each] * max(counts, default=1) for each in (question, context))
    return asked, given, bool(counts)


def _answers(row: Row) -> list[Answer]:
    return items(row, Answer, lambda found: found.start >= 0)


def _best(row: Row) -> Answer:
    found = _answers(row)
    if not found:
        raise ServerError("the server found no answer")
    return found[0]
