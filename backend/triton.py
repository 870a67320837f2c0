"""The only module that knows Triton's Python-backend API. It does not know what the tensors mean."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
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


class Asked:
    """One request and the way back to its caller; whoever has it ends it exactly once: `answer`, `end` or `fail`."""

    def __init__(self, request: Any) -> None:
        self._request: Any = request
        self._sender = request.get_response_sender()

    def rows(self) -> list[dict[str, Any]]:
        """Its inputs, as `rows`; once, inside execute()."""
        request, self._request = self._request, None
        return rows(request)

    def parameters(self) -> dict[str, Any]:
        """As `parameters`; before `rows`."""
        return parameters(self._request)

    def cancelled(self) -> bool:
        """Whether the caller has gone; costs about 100 µs."""
        return bool(self._sender.is_cancelled())

    def send(self, outputs: Outputs) -> None:
        """One response, which others follow."""
        self._sender.send(_response(outputs))

    def answer(self, outputs: Outputs) -> None:
        """The only response, or the last one."""
        self._sender.send(_response(outputs), flags=FINAL)

    def end(self) -> None:
        """No more responses."""
        self._sender.send(flags=FINAL)

    def fail(self, error: Exception) -> None:
        """An error, the last that is sent."""
        self._sender.send(pb_utils.InferenceResponse(error=failure(served(error))), flags=FINAL)


def _response(outputs: Outputs) -> Any:
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in outputs.items()])


def served(error: BaseException) -> ServingError:
    """Any failure as one that has a status; what is not ours is a bug, logged here and named to the caller by class."""
    if isinstance(error, ServingError):
        return error
    log.error("unexpected failure", exc_info=error)
    return serving(error)


def failure(error: ServingError) -> Any:
    """As Triton's error."""
    return pb_utils.TritonError(error.wire(), getattr(pb_utils.TritonError, error.code))
