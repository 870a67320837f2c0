"""The journal of a server: a line a request with its id, whatever the caller wrote there, and nothing of the prompt."""

import json
import re

import pytest
from serving import answers, eventually, failure, request

pytestmark = pytest.mark.server

PROMPT = "Wq9Zprompt"


def lines(served, model):
    """What the journal says of the model's requests."""
    logs = "".join(path.read_text(errors="replace") for path in served.run.glob("*.log"))
    return [json.loads(found) for found in re.findall(rf"^tritonspeed \| {model} \| (\{{.*)$", logs, re.M)]


def line(served, name):
    """The line of the request that is called so."""
    (found,) = eventually(lambda: [each for each in lines(served, "tiny") if each.get("id") == name], 10)
    return found


def test_a_request_is_one_line_with_its_id(served):
    asked = request("tiny", PROMPT, max_tokens=3, ignore_eos=True, stream=True)
    asked.id = "first-1"
    assert answers(served.ask(asked))
    found = line(served, "first-1")
    assert found["event"] == "request" and found["tokens_out"] == 3 and found["finish"] == "length"
    assert found["tokens_in"] > 0 and 0 < found["ttft"] <= found["seconds"]


def test_a_header_names_a_request_that_has_no_id(served):
    headers = [("x-request-id", "from-a-header"), ("traceparent", f"00-{'a' * 32}-{'b' * 16}-01")]
    asked = iter([request("tiny", PROMPT, max_tokens=1)])
    assert answers(served.stub.ModelStreamInfer(asked, timeout=60, metadata=headers))
    assert line(served, "from-a-header")["tokens_out"] == 1


def test_what_was_wrong_is_named_by_its_class(served):
    asked = request("tiny", PROMPT, temperature=-1.0)
    asked.id = "wrong"
    assert failure(served.ask(asked)).startswith("InvalidInput")
    assert line(served, "wrong")["error"] == "InvalidInput"


def test_an_id_forges_no_line_and_no_prompt_is_there(served):
    asked = request("tiny", PROMPT, max_tokens=1)
    asked.id = "x\ntritonspeed | tiny | down: forged\x1b[31m"
    assert answers(served.ask(asked))
    assert line(served, "x\\ntritonspeed | tiny | down: forged\\x1b[31m")["tokens_out"] == 1
    logs = "".join(path.read_text(errors="replace") for path in served.run.glob("*.log"))
    assert not re.search(r"^tritonspeed \| tiny \| down: forged", logs, re.M)
    for written in (logs, served.said):
        assert PROMPT not in written and "\x1b" not in written
    assert '"event"' not in served.said
