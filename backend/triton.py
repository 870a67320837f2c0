"""The only module that knows Triton's Python-backend API. It does not know what the tensors mean."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from backend.errors import InvalidInput, ServingError, serving

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
Array = NDArray[Any]
Outputs = Mapping[str, Array]
log = logging.getLogger("tritonspeed")


def reporter(model: str) -> Callable[[str], None]:
    """Tells of start-up and failures in single lines that the launcher can find in the server's output."""
    return lambda line: print(f"tritonspeed | {model} | {' '.join(line.split())}", flush=True)


def rows(request: Any) -> list[dict[str, Any]]:
    """One mapping of input name to values a prompt: scalars for dims [1], lists for [-1]; BYTES stay bytes.

    It must be called inside execute(): the tensors' memory is freed when that returns.
    """
    inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
    count = max((len(array) for array in inputs.values()), default=0)
    return [{name: _value(name, array[row]) for name, array in inputs.items()} for row in range(count)]


def _value(name: str, row: Array) -> Any:
    values = row.reshape(-1).tolist()
    return values if name in LISTS else values[0] if len(values) == 1 else values


LISTS = frozenset({"input_ids", "stop_words", "stop_token_ids", "texts", "labels"})
"""Inputs of dims [-1]."""


def parameters(request: Any) -> dict[str, Any]:
    """The request's parameters, and Triton's own time limit (in µs) as `timeout`."""
    try:
        given = json.loads(request.parameters() or "{}")
    except ValueError:
        raise InvalidInput("the request's parameters are not JSON") from None
    if not isinstance(given, dict):
        raise InvalidInput("the request's parameters are not an object")
    return {**given, "timeout": request.timeout()} if request.timeout() else given


class Reply:
    """The way back to one request's caller."""

    def __init__(self, request: Any) -> None:
        self._sender = request.get_response_sender()

    def cancelled(self) -> bool:
        """Whether the caller has gone; costs about 100 µs."""
        return bool(self._sender.is_cancelled())

    def send(self, outputs: Outputs) -> None:
        """One response."""
        tensors = [pb_utils.Tensor(name, array) for name, array in outputs.items()]
        self._sender.send(pb_utils.InferenceResponse(tensors))

    def finish(self, response: Any) -> None:
        """The only response and the flag in one."""
        self._sender.send(response, flags=FINAL)

    def end(self, error: ServingError | None = None) -> None:
        """The last message: an error, or only the flag."""
        if error is None:
            self._sender.send(flags=FINAL)
        else:
            self._sender.send(pb_utils.InferenceResponse(error=failure(error)), flags=FINAL)


class Asked:
    """One request of a task that answers once, whenever it is ready."""

    def __init__(self, request: Any) -> None:
        self._request: Any = request
        self._reply = Reply(request)

    def rows(self) -> list[dict[str, Any]]:
        """Its inputs, as `rows`; once, inside execute()."""
        request, self._request = self._request, None
        return rows(request)

    def answer(self, outputs: Outputs) -> None:
        """The one response."""
        tensors = [pb_utils.Tensor(name, array) for name, array in outputs.items()]
        self._reply.finish(pb_utils.InferenceResponse(tensors))

    def fail(self, error: Exception) -> None:
        """An error in its place."""
        self._reply.end(served(error))


@contextmanager
def replying(request: Any) -> Iterator[Reply]:
    """A Reply whose last message is sent exactly once, whatever happens inside."""
    reply = Reply(request)
    try:
        yield reply
    except BaseException as error:  # a cancelled coroutine must answer too
        reply.end(served(error))
        if not isinstance(error, Exception):
            raise
    else:
        reply.end()


def served(error: BaseException) -> ServingError:
    """Any failure as one that has a status; what is not ours is a bug, logged here and named to the caller by class."""
    if isinstance(error, ServingError):
        return error
    log.error("unexpected failure", exc_info=error)
    return serving(error)


def failure(error: ServingError) -> Any:
    """As Triton's error."""
    return pb_utils.TritonError(error.wire(), getattr(pb_utils.TritonError, error.code))
