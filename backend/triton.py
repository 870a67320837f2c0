"""The only module that knows Triton's Python-backend API. It does not know what the tensors mean."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from backend import parent
from backend.blame import tell
from backend.departure import Departure, Latest
from backend.errors import InvalidInput, ServingError, serving
from backend.metrics import COUNTER, GAUGE
from backend.spans import VARIABLE
from backend.tally import Change, Tally

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
Array = NDArray[Any]
Outputs = Mapping[str, Array]
log = logging.getLogger("tritonspeed")

if parent.is_triton():
    parent.leave_with()


def reporter(model: str) -> Callable[[str], None]:
    """Tells of start-up and failures in single lines that the launcher can find in the server's output."""

    def report(line: str) -> None:
        sys.stdout.write(f"tritonspeed | {model} | {' '.join(line.split())}\n")  # in one piece: others write there too
        sys.stdout.flush()

    return report


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


OPEN: set[Asked] = set()
"""Requests that have not been ended."""


class Asked:
    """One request and the way back to its caller; whoever has it ends it exactly once: `answer`, `end` or `fail`.

    With its end it lets go of Triton's objects: Triton unloads no model while a way back is open, and one whose last
    response could not be sent stays open until its sender is destroyed.
    """

    def __init__(self, request: Any) -> None:
        OPEN.add(self)
        self._request: Any = request
        self._sender: Any = request.get_response_sender()
        self.request_id: str = request.request_id()
        """The caller's own name for it, or once `parameters` are read its header x-request-id."""
        self.trace = _trace(request) if VARIABLE in os.environ else ""
        """The traceparent of Triton's span, empty where it keeps none."""

    def rows(self) -> list[dict[str, Any]]:
        """Its inputs, as `rows`; once, inside execute()."""
        request, self._request = self._request, None
        return rows(request)

    def parameters(self) -> dict[str, Any]:
        """As `parameters`; before `rows`."""
        found = parameters(self._request)
        self.request_id = self.request_id or _header(found, "x-request-id")
        return found

    def cancelled(self) -> bool:
        """Whether the caller has gone; costs about 100 µs. Not to be asked after the end."""
        return bool(self._sender.is_cancelled())

    def send(self, outputs: Outputs) -> None:
        """One response, which others follow."""
        self._sender.send(_response(outputs))

    def answer(self, outputs: Outputs) -> None:
        """The only response, or the last one."""
        self._end(_response(outputs))

    def end(self) -> None:
        """No more responses."""
        self._end()

    def fail(self, error: Exception) -> None:
        """An error, the last that is sent."""
        self._end(pb_utils.InferenceResponse(error=failure(served(error))))

    def _end(self, *response: Any) -> None:
        sender, self._sender, self._request = self._sender, None, None
        if sender is None:
            raise ServingError("the request has been ended already")
        OPEN.discard(self)
        sender.send(*response, flags=FINAL)


def _trace(request: Any) -> str:
    try:
        return str(json.loads(request.trace().get_context() or "{}").get("traceparent", ""))
    except Exception as error:  # it is served without
        log.debug("no trace context", exc_info=error)
        return ""


def _header(parameters: Mapping[str, Any], name: str) -> str:
    """Triton keeps the letters as the caller wrote them."""
    return next((str(value) for key, value in parameters.items() if key.lower() == name), "")


def _response(outputs: Outputs) -> Any:
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in outputs.items()])


def served(error: BaseException) -> ServingError:
    """Any failure as one that has a status; what is not ours is a bug, whose message the log does not get."""
    if isinstance(error, ServingError):
        return error
    tell(log, "unexpected failure", error)
    return serving(error)


def failure(error: ServingError) -> Any:
    """As Triton's error."""
    return pb_utils.TritonError(error.wire(), getattr(pb_utils.TritonError, error.code))


def departure(args: Mapping[str, str], latest: Latest, leave: Callable[[], None]) -> Departure:
    """Of this stub's model. Triton is not asked: 2.51 aborted after is_model_ready had been asked at its start."""

    def forgotten() -> None:
        reporter(args["model_name"])("out of service, and still held by the server: its ranks end")
        leave()

    return Departure(lambda: bool(latest), lambda: not OPEN, forgotten)


PUSH = 1.0
"""Seconds between two pushes; each number costs about 20 µs."""


class Exporter:
    """Brings a tally into Triton's metrics, from a thread of its own. To be made in `initialize`, ended in `finalize`.

    A server without metrics serves without them. The same thread calls `leave` once Triton has forgotten the model.
    """

    def __init__(self, args: Mapping[str, str], tally: Tally, leave: Callable[[], None] = lambda: None) -> None:
        self._tally = tally
        self._latest = Latest(f"{args.get('model_instance_name', args['model_name'])}-{args['model_version']}")
        self._departure = departure(args, self._latest, leave)
        self._labels = {"model": args["model_name"], "version": args["model_version"]}
        self._families: list[Any] = []
        self._series: dict[tuple[str, str], Any] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="exporter", daemon=True)
        try:
            self._make()
        except Exception as error:
            reporter(args["model_name"])(f"no metrics: {error}")
        else:
            self._push()  # what is ready is already known to be up
            self._thread.start()

    def close(self) -> None:
        """Push what is left, and leave Triton's objects alone for ever.

        A reloaded model has made its own before. Triton 2.51 lets both write the same series, but takes it away,
        under the new one's hands, when the old one's objects go. Left alone, counters go on instead of starting at 0.
        """
        self._closing.set()
        if self._thread.ident:
            self._thread.join()
        self._latest.close()
        for each in (*self._families, *self._series.values()):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))  # they outlive the interpreter

    def _make(self) -> None:
        """Every series, so that each is there before anything has happened; the module has MetricFamily only now."""
        for metric in self._tally.metrics:
            kind = getattr(pb_utils.MetricFamily, metric.kind.upper())
            family = pb_utils.MetricFamily(name=metric.name, description=metric.meaning, kind=kind)
            self._families.append(family)
            buckets = {"buckets": list(metric.buckets)} if metric.buckets else {}
            for reason in metric.reasons:
                labels = {**self._labels, **({"finished_reason": reason} if reason else {})}
                self._series[metric.name, reason] = family.Metric(labels=labels, **buckets)

    def _run(self) -> None:
        while not self._closing.wait(PUSH):
            self._push()
            if self._departure.look():  # its successor, if there is one, writes the same series
                break
        self._push(last=True)

    def _push(self, last: bool = False) -> None:
        try:
            for change in self._tally.changes(last):
                if not parent.lives():  # 2.51 would keep the interpreter waiting for it, and this process for ever
                    return self._closing.set()
                self._tell(change)
        except Exception as error:  # the next push may work
            tell(log, "metrics could not be pushed", error)

    def _tell(self, change: Change) -> None:
        series = self._series[change.metric.name, change.reason]
        if change.metric.kind == COUNTER:
            series.increment(change.value)
        elif change.metric.kind == GAUGE:
            series.set(change.value)
        else:
            series.observe(change.value)
