"""One line a request: what stands in it, what cannot, and where it goes."""

import json
from types import SimpleNamespace

import pytest

from backend.errors import InvalidInput
from backend.journal import LONGEST, Entry, Journal
from backend.launcher.log import Log
from backend.launcher.output import Output

HOSTILE = 'a"}\n\x1b[31mtritonspeed | m | down: forged\r\u2028é\x85'


def written(error=None, request_id="seven", on=True, **counts):
    said = []
    entry = Journal(said.append, on).entry(SimpleNamespace(request_id=request_id))
    for name, number in counts.items():
        entry.add(name, number)
    entry.close(error)
    return said


def test_a_line_says_what_was_done():
    (line,) = written(tokens_in=3, tokens_out=4)
    found = json.loads(line)
    assert found.pop("seconds") >= 0
    assert found == {"event": "request", "id": "seven", "tokens_in": 3, "tokens_out": 4, "finish": "stop"}


def test_reasons_and_the_first_token():
    said = []
    entry = Journal(said.append).entry(SimpleNamespace(request_id=""))
    entry.reasons |= {"stop", "length"}
    entry.first = entry.arrived + 0.25
    entry.close()
    found = json.loads(said[0])
    assert found["finish"] == "length,stop" and found["ttft"] == pytest.approx(0.25) and "id" not in found


def test_a_failure_names_its_class_and_nothing_of_its_message():
    (line,) = written(InvalidInput("secret prompt"))
    assert json.loads(line)["error"] == "InvalidInput" and "secret" not in line and "finish" not in line


def test_an_id_can_neither_forge_a_line_nor_fill_the_log():
    (line,) = written(request_id=HOSTILE)
    assert line.isprintable() and line.isascii()
    assert json.loads(line)["id"].startswith('a"}\\n\\x1b[31m')
    (long,) = written(request_id="\x00" * 10**6)
    assert len(json.loads(long)["id"]) == LONGEST


def test_switched_off_it_says_nothing_and_no_journal_is_needed():
    assert written(on=False) == []
    Entry().close()


def test_its_lines_are_in_the_log_and_not_on_the_terminal(tmp_path):
    shown, (line,) = [], written(request_id=HOSTILE)
    output = Output(Log(tmp_path / "log"), False, shown.append)
    output.read([f"tritonspeed | m | {line}\n", "tritonspeed | m | ready in 1 s\n"])
    assert shown == ["m | ready in 1 s"] and list(output.tail) == ["tritonspeed | m | ready in 1 s"]
    assert line in output.log.path.read_text()
    assert output.states.trouble("m") is None
