"""Transport: the seam of one method, `infer`, between pipelines and the network; here over gRPC, blocking.

It does not know what the tensors mean. Each request is a call of its own, so that it has its own deadline and its own
cancellation (Triton ends every request of a call that is cancelled): ModelStreamInfer for models that may answer many
times, ModelInfer for the others, since Triton 2.51 fails streamed requests to models with a response cache.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple, Protocol, TypeAlias

import grpc
from tritonclient.grpc import service_pb2

from client.channel import Endpoint, connect
from client.errors import Cancelled, DeadlineExceeded, Error, failure
from client.limits import Attempts, Limits
from client.watchdog import Watchdog

Request: TypeAlias = service_pb2.ModelInferRequest
Response: TypeAlias = service_pb2.ModelInferResponse
Streamed: TypeAlias = service_pb2.ModelStreamInferResponse
Opener = Callable[..., Any]
"""From a request, timeout and metadata: the call, to be read message by message."""


class Responses(Protocol):
    """What comes back for one request, as it comes; errors are those of `client.errors`."""

    def __iter__(self) -> Iterator[Response]: ...

    def __next__(self) -> Response: ...

    def close(self) -> None:
        """End the request, wherever it is; may be called from another thread."""


class Transport(Protocol):
    """How requests reach a server."""

    def infer(self, request: Request, limits: Limits) -> Responses:
        """Send one request; its responses, none, one or many, are read from the result."""

    def close(self) -> None: ...


class GrpcTransport:
    """gRPC channels to the addresses of an endpoint, opened when first used. Threads may share it.

    `streamed`: for models that may answer many times.
    """

    def __init__(self, endpoint: Endpoint, streamed: bool = True) -> None:
        self._openers: dict[int, Opener] = {}
        self._channels: list[grpc.Channel] = []
        self._opening = threading.Lock()
        self._turns = itertools.count()
        self.endpoint, self.streamed = endpoint, streamed
        self.watchdog = Watchdog()
        self.metadata = endpoint.metadata  # never triton_grpc_error: errors that come at once then crash Triton 2.51

    def infer(self, request: Request, limits: Limits) -> GrpcResponses:
        """Send one request, at the address whose turn it is first."""
        attempts = Attempts(len(self.endpoint.addresses), limits, start=next(self._turns))
        return GrpcResponses(self, request, attempts)

    def opener(self, address: int) -> Opener:
        """What makes calls to an address, by its number."""
        with self._opening:
            if address not in self._openers:
                self._channels.append(connect(self.endpoint, self.endpoint.addresses[address]))
                self._openers[address] = opener(self._channels[-1], self.streamed)
            return self._openers[address]

    def close(self) -> None:
        """Close the connections; requests still running are cancelled."""
        with self._opening:
            while self._channels:
                self._channels.pop().close()
            self._openers.clear()


class GrpcResponses:
    """One request and its tries. The call starts with the first read."""

    def __init__(self, transport: GrpcTransport, request: Request, attempts: Attempts) -> None:
        self._transport, self._request, self._attempts = transport, request, attempts
        self._call: grpc.Call | None = None
        self._closed = threading.Event()
        self._begun = self._idle = False

    def __iter__(self) -> GrpcResponses:
        return self

    def __next__(self) -> Response:
        while True:
            try:
                response = self._read()
            except Error as error:
                self._pause(error)
            else:
                self._begun = True
                return response

    def close(self) -> None:
        """Cancel the call; a pause between two tries ends too."""
        self._closed.set()
        if self._call is not None:
            self._call.cancel()

    @property
    def _address(self) -> str:
        return self._transport.endpoint.addresses[self._attempts.address]

    def _read(self) -> Response:
        if self._closed.is_set():
            raise Cancelled("the request was closed here")
        call = self._call = self._call or self._open()
        if self._closed.is_set():  # by another thread, which has not seen this call
            call.cancel()
        try:
            with self._transport.watchdog.limit(self._attempts.wait_limit(first=not self._begun), self._expire):
                message = next(call)
                if message.error_message:
                    exhaust(call)
                return unwrap(message, self._address)
        except grpc.RpcError as error:
            raise self._translate(error) from None

    def _open(self) -> grpc.Call:
        left = self._attempts.remaining()
        stamp_timeout(self._request, left)
        call = self._transport.opener(self._attempts.address)
        return call(self._request, timeout=left, metadata=self._transport.metadata)

    def _expire(self) -> None:
        self._idle = True
        if self._call is not None:
            self._call.cancel()

    def _translate(self, error: grpc.RpcError) -> Error:
        if self._idle:
            return self._attempts.too_idle(self._address)
        if self._closed.is_set():
            return Cancelled("the request was closed here")
        return translate(error, self._attempts, self._address)

    def _pause(self, error: Error) -> None:
        if self._begun:
            raise error
        self._call = None
        if self._closed.wait(self._attempts.after(error)):
            raise Cancelled("the request was closed here") from error


def opener(channel: Any, streamed: bool) -> Opener:
    """For a channel, blocking or not. ModelInfer's one message is read as a stream's.

    ModelStreamInfer takes many requests; sent as the only one, ours needs no thread that waits for more, and its end
    goes with it.
    """
    method, deserializer = ("ModelStreamInfer", Streamed.FromString) if streamed else ("ModelInfer", _alone)
    made: Opener = channel.unary_stream(
        f"/inference.GRPCInferenceService/{method}",
        request_serializer=Request.SerializeToString,
        response_deserializer=deserializer,
    )
    return made


class Alone(NamedTuple):
    """ModelInfer's only message, read as a stream's; a message of protobuf in its place would copy all tensors."""

    infer_response: Response
    error_message: str = ""


Message: TypeAlias = Streamed | Alone


def _alone(message: bytes) -> Alone:
    return Alone(Response.FromString(message))


def stamp_timeout(request: Request, seconds: float | None) -> None:
    """Tell the server how long the answer is waited for, so that it need not work longer."""
    if seconds is not None:
        request.parameters["timeout"].int64_param = max(1, round(seconds * 1e6))


def unwrap(message: Message, address: str) -> Response:
    """The response inside. A failed request's error stands in its message, and the call's own status is OK."""
    if message.error_message:
        raise failure("INTERNAL", message.error_message, address)
    return message.infer_response


def exhaust(call: Iterator[object]) -> None:
    """Let the server end a call that has failed, rather than cancel it while it does."""
    with suppress(grpc.RpcError):
        for _ in call:
            pass


def translate(error: grpc.RpcError, attempts: Attempts, address: str) -> Error:
    """Ours for gRPC's."""
    found = failure(error.code().name, error.details() or "", address)
    own = isinstance(found, DeadlineExceeded) and found.code == "DEADLINE_EXCEEDED" and attempts.limits.timeout
    return attempts.too_late() if own else found
