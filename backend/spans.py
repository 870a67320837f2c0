"""Spans: where a traced request spent its time, to an OpenTelemetry collector as OTLP/HTTP JSON.

A thread of its own sends them in batches. Whoever serves never waits: what does not fit, or cannot be delivered, is
dropped. It knows no Triton: a request's `trace` is the W3C traceparent of the server's own span.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backend.journal import Entry

VARIABLE = "TRITONSPEED_OTEL"
"""Of the environment: the collector's address, as the launcher got it."""
KEPT = 2048
"""Requests that wait to be sent."""
BATCH = 256
PAUSE = 0.5
"""Seconds between two batches."""
TIMEOUT = 2.0
ERROR = 2
"""OTLP's status code."""
_PARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")


@dataclass(frozen=True)
class Told:
    """What the spans of a request say beside its times; nothing that it asked."""

    attributes: Mapping[str, str] = field(default_factory=dict)
    error: str = ""
    """The class of what it ended with; empty: it did not fail."""


class Spans:
    """One model's."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._waiting: deque[tuple[str, Entry, float, Told]] = deque(maxlen=KEPT)
        threading.Thread(target=self._run, name="spans", daemon=True).start()

    def add(self, trace: str, entry: Entry, now: float, told: Told) -> None:
        """Any thread: a request that is over."""
        self._waiting.append((trace, entry, now, told))

    def _run(self) -> None:
        while True:
            time.sleep(PAUSE)
            while self._waiting:
                self._send([self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))])

    def _send(self, requests: list[tuple[str, Entry, float, Told]]) -> None:
        try:
            spans = [span for request in requests for span in spans_of(*request)]
            body = json.dumps(_message(spans)).encode()
            asked = urllib.request.Request(self._url, body, {"Content-Type": "application/json"})  # noqa: S310
            with urllib.request.urlopen(asked, timeout=TIMEOUT):  # noqa: S310
                pass
        except Exception:
            return  # nobody listens: dropped


def from_environment(environment: Mapping[str, str]) -> Spans | None:
    return Spans(url) if (url := environment.get(VARIABLE)) else None


def spans_of(trace: str, entry: Entry, now: float, told: Told) -> list[dict[str, Any]]:
    """queue, prefill, decode and send, as far as it came; of a request without tokens one, serve.

    The last of a request that failed has the error.
    """
    if not (parent := _PARENT.fullmatch(trace)):
        return []
    times = [entry.arrived, *(at for at in (entry.begun, entry.first, entry.last) if at), now]
    names = ("queue", "prefill", "decode", "send") if entry.begun else ("serve",)
    shift = time.time() - time.monotonic()
    spans: list[dict[str, Any]] = [
        {
            "traceId": parent[1],
            "spanId": secrets.token_hex(8),
            "parentSpanId": parent[2],
            "name": f"tritonspeed.{name}",
            "kind": 1,
            "startTimeUnixNano": str(int((start + shift) * 1e9)),
            "endTimeUnixNano": str(int((end + shift) * 1e9)),
            "attributes": _attributes(told.attributes),
        }
        for name, start, end in zip(names, times, times[1:], strict=False)
    ]
    if told.error:
        spans[-1]["status"] = {"code": ERROR, "message": told.error}
    return spans


def _attributes(values: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"key": key, "value": {"stringValue": value}} for key, value in values.items() if value]


def _message(spans: list[dict[str, Any]]) -> dict[str, Any]:
    scopes = [{"scope": {"name": "tritonspeed"}, "spans": spans}]
    resource = {"attributes": _attributes({"service.name": "tritonspeed"})}
    return {"resourceSpans": [{"resource": resource, "scopeSpans": scopes}]}
