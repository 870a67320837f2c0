"""What a log says of a failure, and what Triton's adapter holds of a request that is over."""

import importlib.util
import logging
import sys
import types
from pathlib import Path

import pytest

from backend.blame import CAUSES, DEEPEST, places, tell
from backend.errors import EngineDown
from backend.generation.delivery import refuse
from backend.tasks.request import Request

PROMPT = "my secret prompt"


def fails():
    raise ValueError(f"cannot read {PROMPT!r}")


def caught(call):
    try:
        call()
    except Exception as error:
        return error


def wrapped():
    try:
        fails()
    except ValueError as error:
        raise KeyError(PROMPT) from error


def test_places_name_classes_files_and_functions_and_no_message():
    line = places(caught(wrapped))
    assert line.startswith("KeyError at backend/test_blame.py:") and "; after ValueError at " in line
    assert " fails < " in line and PROMPT not in line and "\n" not in line


def test_places_are_bounded_and_need_no_traceback():
    def deep(depth):
        return deep(depth - 1) if depth else fails()

    assert places(caught(lambda: deep(50))).count(" < ") == DEEPEST - 1
    first, second = ValueError("a"), KeyError("b")
    first.__cause__, second.__cause__ = second, first
    assert places(first) == "; after ".join(["ValueError", "KeyError"] * (CAUSES // 2))


def test_a_cause_that_was_suppressed_is_not_named():
    def hidden():
        try:
            fails()
        except ValueError:
            raise KeyError("x") from None

    assert "ValueError" not in places(caught(hidden))


def test_messages_are_logged_at_debug_alone(caplog):
    log = logging.getLogger("of.this.test")
    with caplog.at_level(logging.INFO):
        tell(log, "it failed", caught(wrapped))
    assert PROMPT not in caplog.text and "it failed: KeyError at " in caplog.text
    caplog.clear()
    with caplog.at_level(logging.DEBUG):
        tell(log, "it failed", caught(wrapped))
    assert PROMPT in caplog.text


class Broken:
    """A caller whose way back raises what quotes the prompt."""

    request_id = trace = ""

    def fail(self, error):
        fails()

    answer = fail


def test_a_way_back_that_is_broken_is_logged_without_the_prompt(caplog):
    caplog.set_level(logging.INFO)
    refuse(Broken(), EngineDown(PROMPT))
    Request(Broken()).settle(EngineDown(PROMPT))
    Request(Broken()).settle({})
    assert PROMPT not in caplog.text
    assert "failed with EngineDown could not be answered: ValueError" in caplog.text
    assert caplog.text.count("a response could not be sent: ValueError") == 2


# ---- Triton's adapter


@pytest.fixture
def triton(monkeypatch):
    """backend.triton over as much of Triton's module as it needs to end a request."""
    fake = types.ModuleType("triton_python_backend_utils")
    fake.TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    fake.InferenceResponse = lambda error: error
    fake.TritonError = type("TritonError", (), {"UNAVAILABLE": 2, "__init__": lambda self, text, code: None})
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake)
    file = Path(__file__).parents[2] / "backend" / "triton.py"
    spec = importlib.util.spec_from_file_location("triton_of_this_test", file)
    triton = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(triton)
    return triton


class Sender:
    """Triton's, as far as it is used; one that `breaks` fails with its first response and is closed then."""

    def __init__(self, breaks=False):
        self.breaks, self.flags = breaks, []

    def send(self, *response, flags=0):
        self.flags.append(flags)
        if self.breaks:
            fails()


class Asking:
    def __init__(self, sender):
        self.sender = sender

    def get_response_sender(self):
        return self.sender

    def request_id(self):
        return ""


def test_an_unexpected_failure_is_logged_without_its_message_and_told_to_its_caller(triton, caplog):
    caplog.set_level(logging.INFO)
    assert PROMPT in triton.served(caught(wrapped)).wire()
    assert PROMPT not in caplog.text and "unexpected failure: KeyError at " in caplog.text


@pytest.mark.parametrize("end", [lambda asked: asked.end(), lambda asked: asked.fail(EngineDown("x"))])
@pytest.mark.parametrize("breaks", [False, True])
def test_the_end_lets_go_of_tritons_objects(triton, end, breaks):
    """Whoever still holds the request must not keep its model from being unloaded."""
    sender = Sender(breaks)
    held = sys.getrefcount(sender)
    asked = triton.Asked(Asking(sender))
    assert {asked} == triton.OPEN
    assert isinstance(caught(lambda: end(asked)), ValueError if breaks else type(None))
    assert sender.flags == [triton.FINAL]
    assert sys.getrefcount(sender) == held and not triton.OPEN
    assert "ended already" in str(caught(asked.end))
    assert sender.flags == [triton.FINAL]


def test_a_model_that_was_replaced_leaves(triton, monkeypatch):
    monkeypatch.setattr("backend.departure.LOOK", 0.0)
    monkeypatch.setattr("backend.departure.PATIENCE", 0.0)
    left, latest = [], [1]
    departure = triton.departure({"model_name": "m", "model_version": "3"}, latest, lambda: left.append(1))
    departure.look()
    departure.look()
    assert not left
    latest.clear()
    departure.look()
    departure.look()
    assert left == [1]
