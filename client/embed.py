"""Embed: texts in, vectors out. It does not know how requests travel."""

from __future__ import annotations

from typing import Any, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from client.errors import ServerError
from client.pipeline import Answer, AsyncPipeline, Call, Pipeline
from client.rows import block, cut, is_many, order, texts
from client.values import table, tensors

OPTIONS = table(
    ("normalize", "bool", "make vectors of length 1"),
    ("truncate", "bool", "cut what is too long; otherwise it is an error"),
    ("dimensions", "int32", "keep so many numbers of each vector"),
    ("pooling", "string", "mean, cls, last or max"),
    ("prompt", "string", "what to put before each text: a text, or its name in the model's configuration"),
)


class Options(TypedDict, total=False):
    """Keyword arguments, all optional; what is not given is as the model has it."""

    normalize: bool
    truncate: bool
    dimensions: int
    pooling: str
    prompt: str
    timeout: float | None
    """Seconds for each request; None: the pipeline's own."""


class Embed(Pipeline):
    """Vectors of texts, blocking."""

    def __call__(self, text: str | list[str], **options: Unpack[Options]) -> NDArray[np.float32]:
        """The vector of a text [dimensions], or those of a list [texts, dimensions]."""
        return self.ask(questions(text, **options), options.get("timeout"))


class AsyncEmbed(AsyncPipeline):
    """Vectors of texts for asyncio."""

    async def __call__(self, text: str | list[str], **options: Unpack[Options]) -> NDArray[np.float32]:
        """As `Embed.__call__`."""
        return await self.ask(questions(text, **options), options.get("timeout"))


def questions(text: str | list[str], *, timeout: float | None = None, **options: Any) -> Call[NDArray[np.float32]]:
    """The task: one row a text."""
    many = is_many(text)
    given: Any = text if many else [text]
    columns = {"text": texts(given, "text")}
    sent = order(columns)
    asked = cut(columns, tensors(OPTIONS, options), sent)

    def result(answers: list[Answer]) -> NDArray[np.float32]:
        pairs = zip(asked, answers, strict=True)
        vectors = [block(question, answer, ["embedding"])["embedding"] for question, answer in pairs]
        if len({array.shape[1:] for array in vectors}) > 1:
            raise ServerError("the server's vectors differ in length; was the model replaced meanwhile?")
        came = np.concatenate(vectors) if vectors else np.empty((0, 0), np.float32)  # [texts, dimensions]
        found = came[np.argsort(sent)] if len(vectors) > 1 else came
        return found if many else found[0]

    return Call(asked, result)
