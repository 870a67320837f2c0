"""What a collector gets of a request that is over: as the spans are made, and as the tasks' service sends them."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from backend.config import EngineConfig
from backend.errors import Cancelled, DeadlineExceeded, EngineDown, InvalidInput
from backend.journal import Journal
from backend.spans import ERROR, VARIABLE, Told, spans_of
from backend.tasks import TASKS
from backend.tasks.service import Service

FAKES = Path(__file__).resolve().parents[1] / "fakes"
sys.path.insert(0, str(FAKES))
from serving_tasks import Asked  # noqa: E402

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
HOSTILE = 'a"}\n\x1b[31mforged\r\u2028é'


def ended(error=None, request_id="seven", **after):
    """The spans of a request that came so far: seconds from its arrival by name of the time."""
    kept, journal = [], Journal(print, on=False, model="mine")
    journal._spans = SimpleNamespace(add=lambda *request: kept.extend(spans_of(*request)))
    entry = journal.entry(SimpleNamespace(request_id=request_id, trace=TRACEPARENT))
    entry.arrived -= 10
    for name, seconds in after.items():
        setattr(entry, name, entry.arrived + seconds)
    entry.close(error)
    return kept


def names(spans):
    return [span["name"].removeprefix("tritonspeed.") for span in spans]


def attributes(span):
    return {each["key"]: each["value"]["stringValue"] for each in span["attributes"]}


def seconds(span):
    return (int(span["endTimeUnixNano"]) - int(span["startTimeUnixNano"])) / 1e9


def test_a_request_that_succeeds_is_four_spans_without_a_status():
    spans = ended(begun=1, first=3, last=6)
    assert names(spans) == ["queue", "prefill", "decode", "send"]
    assert [round(seconds(span)) for span in spans] == [1, 2, 3, 4]
    assert all(one["endTimeUnixNano"] == other["startTimeUnixNano"] for one, other in pairwise(spans))
    assert {(span["traceId"], span["parentSpanId"]) for span in spans} == {(TRACE, PARENT)}
    assert len({span["spanId"] for span in spans}) == 4
    assert all(attributes(span) == {"model": "mine", "request_id": "seven"} for span in spans)
    assert not any("status" in span for span in spans)


@pytest.mark.parametrize(
    ("kind", "after", "expected"),
    [
        (InvalidInput, {}, ["serve"]),
        (DeadlineExceeded, {}, ["serve"]),
        (EngineDown, {"begun": 1}, ["queue", "prefill"]),
        (Cancelled, {"begun": 1, "first": 2}, ["queue", "prefill", "decode"]),
    ],
)
def test_a_failure_is_an_error_of_the_span_that_it_came_in(kind, after, expected):
    spans = ended(kind("the secret"), **after)
    assert names(spans) == expected
    assert spans[-1]["status"] == {"code": ERROR, "message": kind.__name__}
    assert not any("status" in span for span in spans[:-1])
    assert all(attributes(span) == {"model": "mine", "request_id": "seven"} for span in spans)
    assert "secret" not in json.dumps(spans)


def test_a_callers_id_is_escaped_and_none_is_left_out():
    (span,) = ended(request_id=HOSTILE)
    assert attributes(span)["request_id"].isprintable() and attributes(span)["request_id"].isascii()
    (span,) = ended(request_id="")
    assert attributes(span) == {"model": "mine"}


@pytest.mark.parametrize("trace", ["", "00", f"{TRACEPARENT}\n", TRACEPARENT.upper()])
def test_what_is_no_traceparent_gives_no_spans(trace):
    assert spans_of(trace, Journal(print).entry(SimpleNamespace(request_id="")), 1.0, Told()) == []


# ---- the tasks' service


class Collector(BaseHTTPRequestHandler):
    """Keeps the spans that are posted."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        for resource in body["resourceSpans"]:
            self.server.spans += [span for scope in resource["scopeSpans"] for span in scope["spans"]]
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
        if len(self.server.spans) >= self.server.wanted:
            self.server.enough.set()

    def log_message(self, *_arguments):
        pass


@pytest.fixture
def collector(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    server.spans, server.wanted, server.enough = [], 4, threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv(VARIABLE, f"http://127.0.0.1:{server.server_port}/v1/traces")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def service(tmp_path, monkeypatch, collector):
    monkeypatch.setenv("PYTHONPATH", str(FAKES))
    monkeypatch.setenv("TRITONSPEED_PYTHON", sys.executable)
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.setitem(TASKS, "toy", "toy_task:ToyTask")
    config = EngineConfig(model=str(tmp_path), device="cpu", threads=1)
    service = Service("toy", config, lambda line: None, model="mine")
    service.start()
    yield service
    service.close()


def asked(name, how="", **given):
    made = Asked([{"numbers": [1] * 12, "how": how}])  # four batches
    made.request_id, made.trace, made.given = name, TRACEPARENT, given
    return made


def test_each_request_of_a_task_is_a_span_however_it_ends(service, collector):
    """Of what one call of Triton's brings, and of what its ranks fail."""
    together = [asked("fine"), asked("wrong", "unparsable"), asked("late", "slow", timeout=1)]
    service.serve(together)
    assert [type(each.result()) for each in together] == [dict, InvalidInput, DeadlineExceeded]
    service.serve([dead := asked("dead", "die")])
    assert isinstance(dead.result(), EngineDown)
    assert collector.enough.wait(20), collector.spans
    assert names(collector.spans) == ["serve"] * 4
    assert all(attributes(span)["model"] == "mine" for span in collector.spans)
    status = {attributes(span)["request_id"]: span.get("status", {}).get("message") for span in collector.spans}
    assert status == {"fine": None, "wrong": "InvalidInput", "late": "DeadlineExceeded", "dead": "EngineDown"}
