"""Generate: prompts in, text out, whole or as it is written. It does not know how requests travel."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from client.errors import InvalidInput, ServerError
from client.limits import Limits
from client.pipeline import Answer, AsyncPipeline, Call, Pipeline
from client.sampling import Sampling, encode_options
from client.tensors import Tensors, decode, readable, strings, text

Message = Mapping[str, Any]
"""One turn of a chat: {"role": ..., "content": ...}."""

Prompt = str | list[dict[str, str]] | list[int] | NDArray[np.integer[Any]]
"""Text, a chat, or token ids."""

Prompts = list[str] | list[list[dict[str, str]]] | list[list[int]] | list[NDArray[np.integer[Any]]]


class Options(Sampling, total=False):
    """All keyword arguments of one call but n."""

    timeout: float | None
    """Seconds for each request; None: the pipeline's own."""


@dataclass(frozen=True)
class Generated:
    """One completion."""

    text: str
    finish_reason: str = ""
    """stop or length."""
    num_input_tokens: int | None = None
    num_output_tokens: int | None = None
    cumulative_logprob: float | None = None
    """Only with return_cumulative_logprob."""
    logprobs: list[Any] | None = None
    """One entry a token; only with return_logprobs."""
    index: int = 0
    """Which sample of its prompt."""

    def __str__(self) -> str:
        return self.text


class Delta(str):
    """A piece of a completion: the text itself, and what came with it."""

    index: int  # type: ignore[assignment]  # hides str.index
    """Which sample of the prompt it belongs to."""
    finish_reason: str
    """Empty until the last piece of its sample."""
    num_input_tokens: int | None
    num_output_tokens: int | None
    """Tokens of this piece."""
    cumulative_logprob: float | None
    logprobs: list[Any] | None

    __slots__ = ("cumulative_logprob", "finish_reason", "index", "logprobs", "num_input_tokens", "num_output_tokens")

    @classmethod
    def of(cls, row: Generated) -> Self:
        """From one row of a response."""
        delta = cls(row.text)
        for name in cls.__slots__:
            setattr(delta, name, getattr(row, name))
        return delta

    @property
    def text(self) -> str:
        """The text as a plain str."""
        return str.__str__(self)


class Generate(Pipeline):
    """Text generation, blocking."""

    streamed: ClassVar[bool] = True

    @overload
    def __call__(self, prompt: Prompts, *, n: int, **options: Unpack[Options]) -> list[list[Generated]]: ...
    @overload
    def __call__(self, prompt: Prompt, *, n: int, **options: Unpack[Options]) -> list[Generated]: ...
    @overload
    def __call__(self, prompt: Prompts, **options: Unpack[Options]) -> list[Generated]: ...
    @overload
    def __call__(self, prompt: Prompt, **options: Unpack[Options]) -> Generated: ...
    def __call__(self, prompt: Any, *, timeout: float | None = None, **sampling: Any) -> Any:
        """Complete a prompt, or each of a list, in order; where `n` is given, a list of n takes a completion's place.

        A prompt is text, a chat (list of {"role", "content"}) or token ids. A failure of one of a list ends all.
        """
        return self.ask(questions(prompt, sampling), timeout)

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, n: int | None = None, **sampling: Unpack[Sampling]
    ) -> Generator[Delta, None, None]:
        """The completion in pieces, as they are written. Leaving the loop cancels the request."""
        question = one(prompt, {"n": n, **sampling}, stream=True)
        return self._deltas(question, self._limits(timeout))

    def _deltas(self, question: Tensors, limits: Limits) -> Generator[Delta, None, None]:
        with closing(self.transport.infer(self._request(question), limits)) as responses:
            ends = 0
            for response in responses:
                for delta in map(Delta.of, rows(decode(response))):
                    ends += bool(delta.finish_reason)
                    yield delta
            check_complete(question, ends)


class AsyncGenerate(AsyncPipeline):
    """Text generation for asyncio."""

    streamed: ClassVar[bool] = True

    @overload
    async def __call__(self, prompt: Prompts, *, n: int, **options: Unpack[Options]) -> list[list[Generated]]: ...
    @overload
    async def __call__(self, prompt: Prompt, *, n: int, **options: Unpack[Options]) -> list[Generated]: ...
    @overload
    async def __call__(self, prompt: Prompts, **options: Unpack[Options]) -> list[Generated]: ...
    @overload
    async def __call__(self, prompt: Prompt, **options: Unpack[Options]) -> Generated: ...
    async def __call__(self, prompt: Any, *, timeout: float | None = None, **sampling: Any) -> Any:
        """As `Generate.__call__`."""
        return await self.ask(questions(prompt, sampling), timeout)

    def stream(
        self, prompt: Prompt, *, timeout: float | None = None, n: int | None = None, **sampling: Unpack[Sampling]
    ) -> AsyncGenerator[Delta, None]:
        """As `Generate.stream`; use contextlib.aclosing where the request must end at once when the loop is left."""
        question = one(prompt, {"n": n, **sampling}, stream=True)
        return self._deltas(question, self._limits(timeout))

    async def _deltas(self, question: Tensors, limits: Limits) -> AsyncGenerator[Delta, None]:
        async with aclosing(self.transport.infer(self._request(question), limits)) as responses:
            ends = 0
            async for response in responses:
                for delta in map(Delta.of, rows(decode(response))):
                    ends += bool(delta.finish_reason)
                    yield delta
            check_complete(question, ends)


def questions(prompt: Any, options: Mapping[str, Any]) -> Call[Any]:
    """The task: one question a prompt."""
    samples = options.get("n")
    if not is_many(prompt):
        return Call([one(prompt, options)], lambda answers: completion(answers[0], samples))
    result = partial(map, lambda answer: completion(answer, samples))
    return Call(
        [one(each, options, f"prompt {i}") for i, each in enumerate(prompt)], lambda answers: [*result(answers)]
    )


def one(prompt: Any, options: Mapping[str, Any], what: str = "prompt", stream: bool = False) -> dict[str, NDArray[Any]]:
    """A prompt and its options as tensors of shape [1, k]."""
    return _prompt(prompt, what) | {"stream": np.array([[stream]])} | encode_options(options)


def is_many(prompt: Any) -> bool:
    """Whether a list of prompts was given, rather than one that happens to be a list (a chat, token ids)."""
    if not isinstance(prompt, Sequence) or isinstance(prompt, str | bytes):
        return isinstance(prompt, np.ndarray) and prompt.ndim == 2
    return not prompt or not (isinstance(prompt[0], Mapping) or _is_id_type(type(prompt[0])))


def _prompt(prompt: Any, what: str) -> dict[str, NDArray[Any]]:
    if isinstance(prompt, str):
        return {"text_input": strings(text(prompt, what))}
    items = [*prompt] if isinstance(prompt, list | tuple | np.ndarray) else []
    if items and all(map(_is_message, items)):
        return {"messages": strings(text(_json(items, what), what))}
    if items and all(map(_is_id_type, {*map(type, items)})):
        return {"input_ids": _ids(items, what)}
    raise InvalidInput(
        f'{what} must be text, a chat (a list of {{"role", "content"}}) or token ids, not {prompt!r:.80}'
    )


def _is_id_type(kind: type) -> bool:
    return issubclass(kind, int | np.integer) and kind is not bool


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and "role" in item and "content" in item


def _json(messages: list[Any], what: str) -> str:
    try:
        return json.dumps([dict(message) for message in messages], ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{what} cannot be written as JSON: {error}") from None


def _ids(items: list[Any], what: str) -> NDArray[np.int32]:
    for item in (min(items), max(items)):
        if not 0 <= item < 2**31:
            raise InvalidInput(f"{what} has the token id {item}, which must be from 0 to {2**31 - 1}")
    return np.array([items], np.int32)  # [1, tokens]


def completion(answer: Answer, samples: int | None) -> Generated | list[Generated]:
    """What one prompt's responses amount to: a completion, or a list where samples were asked for."""
    found = sorted((row for tensors in answer for row in rows(tensors)), key=lambda row: row.index)
    if [row.index for row in found] != [*range(1 if samples is None else samples)]:
        raise ServerError(f"the server answered with {len(found)} completions, not {samples or 1}")
    return found[0] if samples is None else found


def check_complete(question: Tensors, ends: int) -> None:
    """Refuse a stream that ended well before its text did: a cut text must not look like a whole one."""
    samples = int(question["n"].item()) if "n" in question else 1
    asked = "return_finish_reason" in question and question["return_finish_reason"].item()
    if asked and ends != samples:
        raise ServerError(f"the stream ended before its text: {ends} of {samples} completions; {ServerError.advice}")


@readable()
def rows(tensors: Mapping[str, NDArray[Any]]) -> list[Generated]:
    """A response's rows, one a sequence; every tensor is [rows, 1]."""
    columns = {name: array.reshape(-1).tolist() for name, array in tensors.items() if name in _COLUMNS}
    count = len(columns.get("text_output", []))
    if wrong := [name for name, column in columns.items() if len(column) != count]:
        raise ServerError(f"the server's answer has {count} texts, but {len(columns[wrong[0]])} of {wrong[0]}")
    return [_row({name: column[i] for name, column in columns.items()}, i) for i in range(count)]


def _row(values: dict[str, Any], i: int) -> Generated:
    if values.get("logprobs") is not None:
        values["logprobs"] = json.loads(values["logprobs"] or "null")
    return Generated(text=values.pop("text_output"), **{"index": i, **values})


_COLUMNS = {"text_output", *Generated.__dataclass_fields__} - {"text"}
