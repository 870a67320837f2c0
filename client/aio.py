"""AsyncTransport and its gRPC form: `client.transport` for asyncio. It does not know what the tensors mean."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Protocol

import grpc

from client.channel import Endpoint, connect_async
from client.errors import Cancelled, Error
from client.limits import Attempts, Limits
from client.transport import Message, Opener, Request, Response, opener, stamp_timeout, translate, unwrap


class AsyncResponses(Protocol):
    """What comes back for one request, as it comes."""

    def __aiter__(self) -> AsyncIterator[Response]: ...

    async def __anext__(self) -> Response: ...

    async def aclose(self) -> None:
        """End the request, wherever it is."""


class AsyncTransport(Protocol):
    """How requests reach a server."""

    def infer(self, request: Request, limits: Limits) -> AsyncResponses: ...

    async def close(self) -> None: ...


class AsyncGrpcTransport:
    """As `client.transport.GrpcTransport`, for the event loop that uses it first."""

    def __init__(self, endpoint: Endpoint, streamed: bool = True) -> None:
        self._openers: dict[int, Opener] = {}
        self._channels: list[grpc.aio.Channel] = []
        self._turns = itertools.count()
        self.endpoint, self.streamed = endpoint, streamed
        self.metadata = endpoint.metadata

    def infer(self, request: Request, limits: Limits) -> AsyncGrpcResponses:
        """Send one request, at the address whose turn it is first."""
        attempts = Attempts(len(self.endpoint.addresses), limits, start=next(self._turns))
        return AsyncGrpcResponses(self, request, attempts)

    def opener(self, address: int) -> Opener:
        """What makes calls to an address, by its number."""
        if address not in self._openers:
            self._channels.append(connect_async(self.endpoint, self.endpoint.addresses[address]))
            self._openers[address] = opener(self._channels[-1], self.streamed)
        return self._openers[address]

    async def close(self) -> None:
        """Close the connections; requests still running are cancelled."""
        self._openers.clear()
        while self._channels:
            await self._channels.pop().close()


class AsyncGrpcResponses:
    """One request and its tries. The call starts with the first read; cancelling the reader cancels it."""

    def __init__(self, transport: AsyncGrpcTransport, request: Request, attempts: Attempts) -> None:
        self._transport, self._request, self._attempts = transport, request, attempts
        self._call: grpc.aio.Call | None = None
        self._messages: AsyncIterator[Message] | None = None
        self._begun = self._closed = False

    def __aiter__(self) -> AsyncGrpcResponses:
        return self

    async def __anext__(self) -> Response:
        while True:
            try:
                response = await self._read()
            except Error as error:
                if self._begun:
                    raise
                self._messages = None
                await asyncio.sleep(self._attempts.after(error))
            else:
                self._begun = True
                return response

    async def aclose(self) -> None:
        """Cancel the call."""
        self._closed = True
        if self._call is not None:
            self._call.cancel()

    @property
    def _address(self) -> str:
        return self._transport.endpoint.addresses[self._attempts.address]

    async def _read(self) -> Response:
        if self._closed:
            raise Cancelled("the request was closed here")
        messages = self._messages = self._messages or self._open()
        try:
            async with asyncio.timeout(self._attempts.wait_limit(first=not self._begun)):
                message = await anext(messages)
                if message.error_message:
                    await _exhaust(messages)
                return unwrap(message, self._address)
        except TimeoutError:
            raise self._attempts.too_idle(self._address) from None
        except asyncio.CancelledError:
            if self._closed:  # by another task: this one is not being cancelled
                raise Cancelled("the request was closed here") from None
            raise
        except grpc.RpcError as error:
            raise translate(error, self._attempts, self._address) from None

    def _open(self) -> AsyncIterator[Message]:
        left = self._attempts.remaining()
        stamp_timeout(self._request, left)
        call = self._transport.opener(self._attempts.address)
        self._call = call(self._request, timeout=left, metadata=self._transport.metadata)
        return aiter(self._call)


async def _exhaust(messages: AsyncIterator[object]) -> None:
    """As `client.transport.exhaust`."""
    with suppress(grpc.RpcError):
        async for _ in messages:
            pass
