"""Ten thousand at once, readers that never read, a full cache, reloads under load. docs/faults.md, 11, 13 to 16."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from google.protobuf import json_format
from guests import counter, guest, memory, tritonserver
from serving import answers, eventually, failure, finals, request
from tritonclient.grpc import service_pb2

from client import Error

pytestmark = pytest.mark.server

LONG = {"max_tokens": 8000, "ignore_eos": True}
GREEDY = {"max_tokens": 20, "temperature": 0.0}
MANY, STREAMS = 10_000, 4
GROWTH = 200
"""MiB that stub and server may have gained after them: buffers that are kept, no queue."""


def test_ten_thousand_at_once(served):
    """All but the two that may wait are refused while the first one still runs; those two are answered after it."""
    with served.pipeline("single") as pipe:
        assert pipe("the quick", **GREEDY).text
    stub, _ = served.family("single")
    before = memory(stub, tritonserver(served))
    counted = [counter(served, f"nv_inference_request_{what}", "single") for what in ("success", "failure")]
    own = counter(served, "tritonspeed_refused_total", "single")
    running = served.ask(request("single", "the", stream=True, **LONG), timeout=280)
    next(running)
    messages = [[] for _ in range(STREAMS)]
    calls = [
        served.ask(
            *(request("single", "the quick", name=str(i), max_tokens=3) for i in range(part, MANY, STREAMS)),
            timeout=280,
        )
        for part in range(STREAMS)
    ]
    threads = [
        threading.Thread(target=lambda c=call, m=found: m.extend(c))
        for call, found in zip(calls, messages, strict=True)
    ]
    for thread in threads:
        thread.start()
    eventually(lambda: sum(map(len, messages)) >= MANY - 2, 200)
    assert next(running).infer_response.outputs  # it has gone on
    running.cancel()
    for thread in threads:
        thread.join(60)
    found = [message for each in messages for message in each]
    assert finals(found) == {str(i): 1 for i in range(MANY)}
    refused = [message.error_message.partition(":")[0] for message in found if message.error_message]
    assert refused == ["Overloaded"] * (MANY - 2)
    assert memory(stub, tritonserver(served)) - before < GROWTH
    with served.pipeline("single") as pipe:
        assert pipe("the quick", **GREEDY).text
    now = [counter(served, f"nv_inference_request_{what}", "single") for what in ("success", "failure")]
    assert sum(now) - sum(counted) == MANY + 2  # the long one, and the one afterwards
    assert eventually(lambda: counter(served, "tritonspeed_refused_total", "single") - own == MANY - 2)


def test_a_deadline_in_prefill(served):
    """An eighth of the time that a prompt of 8,000 tokens takes to its first token: none has come, nothing runs on."""

    def prompt(token, limit):
        given = {"input_ids": [token] * 8000, "max_tokens": 1, "stream": True}
        return served.ask(request("single", None, {"timeout": limit}, **given))

    begin = time.monotonic()
    assert len(answers(prompt(5, 60_000_000))) == 1
    limit = (time.monotonic() - begin) / 8
    assert failure(prompt(6, int(limit * 1e6))).startswith("DeadlineExceeded: ")
    with served.pipeline("single", retries=0) as pipe:
        assert pipe("fox", max_tokens=2, ignore_eos=True, timeout=15).num_output_tokens == 2


def unread(served, body):
    """A connection whose answer nobody reads."""
    text = json.dumps(body)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", served.http))
    head = f"POST /v2/models/tiny/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text)}\r\n\r\n"
    connection.sendall((head + text).encode())
    return connection


def test_readers_that_never_read(served):
    """Eight of them, over HTTP and gRPC, with megabytes each: the neighbours' texts stay, memory is bounded."""
    much = {"n": 16, "max_tokens": 400, "ignore_eos": True, "stream": True, "return_logprobs": True}
    with served.pipeline("tiny") as pipe:
        prompts = [f"prompt {i}" for i in range(6)]
        alone = [one.text for one in pipe(prompts, max_tokens=60, seed=5)]
        stub, _ = served.family("tiny")
        before = memory(stub, tritonserver(served))
        connections = [unread(served, {"text_input": "the", **much}) for _ in range(2)]
        calls = [served.ask(request("tiny", "the", **much)) for _ in range(2)]
        try:
            assert [one.text for one in pipe(prompts, max_tokens=60, seed=5)] == alone
            done = counter(served, "nv_inference_request_success", "tiny")
            eventually(lambda: counter(served, "nv_inference_request_success", "tiny") >= done, 5)
            assert memory(stub, tritonserver(served)) - before < GROWTH
        finally:
            for connection in connections:
                connection.close()
            for call in calls:
                call.cancel()
        assert [one.text for one in pipe(prompts, max_tokens=60, seed=5)] == alone


def test_a_full_cache(served, tiny):
    """Sixteen texts of ten blocks in 24 blocks: each comes out as it does alone; what can never fit is refused."""
    with guest(served, "generate", "crowded", tiny, num_blocks=24, max_sequences=16) as name:
        asked = [request(name, f"prompt {i} " * 6, name=str(i), max_tokens=100, seed=i) for i in range(16)]
        alone = {a["id"]: a["text_output"].item() for each in asked for a in answers(served.ask(each))}
        found = {a["id"]: a["text_output"].item() for a in answers(served.ask(*asked))}
        assert found == alone and len(set(found.values())) == 16
        assert "384 tokens, the limit is 383" in failure(served.ask(request(name, input_ids=[5] * 384)))
        (last,) = answers(served.ask(request(name, input_ids=[5] * 383, return_num_output_tokens=True)))
        assert last["num_output_tokens"].item() == 1


def reload(served, name, **parameters):
    """Load a model again, its parameters overridden in the call."""
    found = served.stub.ModelConfig(service_pb2.ModelConfigRequest(name=name)).config
    for key, value in parameters.items():
        found.parameters[key].string_value = str(value)
    asked = service_pb2.RepositoryModelLoadRequest(model_name=name)
    asked.parameters["config"].string_param = json_format.MessageToJson(found, preserving_proto_field_name=True)
    served.stub.RepositoryModelLoad(asked, timeout=120)


def test_a_reload_with_other_parameters_under_load(served, tiny):
    """Nobody who retries notices; a reload that fails leaves what was there."""
    with guest(served, "generate", "changing", tiny, max_model_len=128) as name, served.pipeline(name) as pipe:
        expected, stop = pipe("the quick", **GREEDY).text, threading.Event()

        def ask(i):
            texts = set()
            while not stop.is_set():
                pieces = pipe.stream("the quick", **GREEDY) if i % 2 else [pipe("the quick", **GREEDY).text]
                try:
                    texts.add("".join(pieces))
                except Error as error:
                    texts.add(repr(error))
            return texts

        with ThreadPoolExecutor(4) as threads:
            asking = [threads.submit(ask, i) for i in range(4)]
            try:
                reload(served, name, max_model_len=64)
                assert "100 tokens, the limit is 63" in failure(served.ask(request(name, input_ids=[5] * 100)))
                with pytest.raises(grpc.RpcError, match="unknown parameter 'wrong'"):
                    reload(served, name, wrong=1)
                assert "100 tokens, the limit is 63" in failure(served.ask(request(name, input_ids=[5] * 100)))
            finally:
                stop.set()
            assert [each.result(60) for each in asking] == [{expected}] * 4
