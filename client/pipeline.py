"""Pipeline and AsyncPipeline: send what a task asks, many requests at once but not too many. They know no task.

A task is a pure function from arguments to a `Call`, and a subclass of each type whose `__call__` asks it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import aclosing, closing, contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, ClassVar, Generic, Self, TypeVar

from client.aio import AsyncTransport
from client.errors import InvalidInput
from client.limits import Limits
from client.tensors import Tensors, decode, encode, readable
from client.transport import Request, Responses, Transport

Answer = list[dict[str, Any]]
"""The responses to one request, each its arrays by name."""

Result = TypeVar("Result")

DEFAULT = Limits()


@dataclass(frozen=True)
class Call(Generic[Result]):
    """One use of a pipeline: what to ask, and what the answers, in the same order, amount to."""

    questions: list[Tensors]
    result: Callable[[list[Answer]], Result]

    def read(self, answers: list[Answer]) -> Result:
        """The result; ServerError where answers are none that this task gives."""
        with readable():
            return self.result(answers)


class _Base:
    """What both types share: the model's name, the limits."""

    streamed: ClassVar[bool] = False
    """Whether its models may answer many times."""

    def __init__(self, name: str, limits: Limits, concurrency: int) -> None:
        if concurrency < 1:
            raise InvalidInput(f"concurrency must be at least 1, not {concurrency}")
        self.name, self.limits, self.concurrency = name, limits, concurrency

    def _request(self, question: Tensors) -> Request:
        return encode(self.name, question)

    def _limits(self, timeout: float | None) -> Limits:
        return self.limits if timeout is None else replace(self.limits, timeout=timeout)


class Pipeline(_Base):
    """A task of a served model, blocking. Threads may share it; close it, or use it in a `with`."""

    def __init__(self, name: str, transport: Transport, limits: Limits = DEFAULT, concurrency: int = 16) -> None:
        super().__init__(name, limits, concurrency)
        self.transport = transport

    def ask(self, call: Call[Result], timeout: float | None = None) -> Result:
        """Send, and wait for all answers; `timeout` seconds hold for each request. Raises `client.Error`."""
        limits = self._limits(timeout)
        return call.read(self._ask_all([self._request(question) for question in call.questions], limits))

    def close(self) -> None:
        """Close the connections."""
        self.transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _ask_all(self, requests: list[Request], limits: Limits) -> list[Answer]:
        if len(requests) < 2:
            return [_read(self.transport.infer(request, limits)) for request in requests]
        live = _Live()
        with ThreadPoolExecutor(min(self.concurrency, len(requests))) as threads:
            futures = [threads.submit(self._ask, request, limits, live) for request in requests]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                live.cancel()
                raise
            return [future.result() for future in futures]

    def _ask(self, request: Request, limits: Limits, live: _Live) -> Answer:
        with live.reading(self.transport.infer(request, limits)) as responses:
            return _read(responses)


class _Live:
    """The requests of one call that are under way, so that a failure can end them all."""

    def __init__(self) -> None:
        self._responses: set[Responses] = set()
        self._cancelled = False

    @contextmanager
    def reading(self, responses: Responses) -> Iterator[Responses]:
        self._responses.add(responses)
        try:
            if self._cancelled:
                responses.close()
            yield responses
        finally:
            self._responses.discard(responses)

    def cancel(self) -> None:
        self._cancelled = True
        for responses in tuple(self._responses):
            responses.close()


def _read(responses: Responses) -> Answer:
    with closing(responses):
        return [decode(response) for response in responses]


class AsyncPipeline(_Base):
    """The same for asyncio; one event loop may use it."""

    def __init__(self, name: str, transport: AsyncTransport, limits: Limits = DEFAULT, concurrency: int = 16) -> None:
        super().__init__(name, limits, concurrency)
        self.transport = transport

    async def ask(self, call: Call[Result], timeout: float | None = None) -> Result:
        """Send, and wait for all answers; `timeout` seconds hold for each request. Raises `client.Error`."""
        limits = self._limits(timeout)
        return call.read(await self._ask_all([self._request(question) for question in call.questions], limits))

    async def close(self) -> None:
        """Close the connections."""
        await self.transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def _ask_all(self, requests: list[Request], limits: Limits) -> list[Answer]:
        seats = asyncio.Semaphore(self.concurrency)
        tasks = [asyncio.ensure_future(self._ask(request, limits, seats)) for request in requests]
        try:
            return list(await asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    async def _ask(self, request: Request, limits: Limits, seats: asyncio.Semaphore) -> Answer:
        async with seats, aclosing(self.transport.infer(request, limits)) as responses:
            return [decode(response) async for response in responses]
