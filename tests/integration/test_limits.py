"""Too much, too late, gone: overload, deadlines and cancelled requests. `single` works on one request at a time.

A request of 8,000 tokens is under way or waits, and ends early; that it no longer runs shows in the next one's answer.
"""

import asyncio
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest
from guests import queued
from serving import answers, eventually, failure, finals, request

from client import Cancelled, DeadlineExceeded, Error, Overloaded

pytestmark = pytest.mark.server

LONG = {"max_tokens": 8000, "ignore_eos": True}


@pytest.fixture(scope="module")
def pipe(served):
    with served.pipeline("single", retries=0) as pipe:
        yield pipe


@pytest.fixture
def idle(pipe):
    """Nothing runs when the test begins nor when it has ended."""
    assert answered(pipe)
    yield
    assert answered(pipe)


def answered(pipe):
    """Whether a short request is done long before 8,000 tokens of others could be."""

    def ask():
        with suppress(Overloaded):  # until it is noticed that those who waited have gone
            return pipe("fox", max_tokens=2, ignore_eos=True, timeout=15).num_output_tokens == 2

    return eventually(ask, 5)


@contextmanager
def busy(served, *more):
    """A long request that has begun, and `more` that wait; they are cancelled at the end."""
    calls = [served.ask(request("single", "the", stream=True, **LONG))]
    next(calls[0])
    calls += [served.ask(each) for each in more]
    try:
        yield calls
    finally:
        for call in calls:
            call.cancel()


def waiting():
    return request("single", "quick", **LONG)


# ---- overload


def test_overload(served, idle, pipe):
    """One runs, two wait, the next is refused at once, over every way."""
    with busy(served, waiting(), waiting()):
        queued(served, 2)
        with pytest.raises(Overloaded, match=r"3 sequences .* the limit is 3"):
            pipe("fox", max_tokens=2)
        assert failure(served.ask(request("single", "fox"))).startswith("Overloaded: ")
        status, text = served.post("single/generate", {"text_input": "fox"})
        assert status >= 400 and "Overloaded: " in text


def test_flood(served, idle):
    """Every one of 300 at once is answered or refused, exactly once; those admitted are right."""
    asked = [request("single", "the quick", name=str(i), max_tokens=3, temperature=0.0) for i in range(300)]
    messages = list(served.ask(*asked))
    assert finals(messages) == {each.id: 1 for each in asked}
    refused = [m.error_message for m in messages if m.error_message]
    texts = {m.infer_response.raw_output_contents[0] for m in messages if m.infer_response.outputs}
    assert len(texts) == 1 and 0 < len(refused) < 300
    assert {message.partition(":")[0] for message in refused} == {"Overloaded"}


def test_flood_of_streams_that_fit(served):
    """300 through the client to a model that works on 64 and lets the rest wait."""
    with served.pipeline("tiny", concurrency=64) as pipe, ThreadPoolExecutor(32) as threads:
        texts = list(threads.map(lambda i: "".join(pipe.stream("the", max_tokens=8, seed=i % 10)), range(300)))
        assert all(texts) and all(text == texts[i % 10] for i, text in enumerate(texts))


# ---- deadlines


@pytest.mark.parametrize("stream", [False, True])
def test_deadline_while_running(served, idle, stream):
    late = request("single", "the", {"timeout": 400_000}, name="late", stream=stream, **LONG)
    *begun, last = served.ask(late)
    assert last.error_message.startswith("DeadlineExceeded: ") and bool(begun) == stream
    assert finals([*begun, last]) == {"late": 1}


def test_deadline_while_queued(served, idle):
    late = request("single", "the", {"timeout": 300_000}, max_tokens=2)
    with busy(served) as (running,):
        assert failure(served.ask(late)).startswith("DeadlineExceeded: ")
        assert next(running).infer_response.outputs  # which goes on


def test_deadline_over_http(served, idle):
    status, text = served.post("single/generate", {"text_input": "the", "timeout": 300_000, **LONG})
    assert status >= 400 and "DeadlineExceeded: " in text
    body = {"text_input": "the", "stream": True, "timeout": 300_000, **LONG}
    status, text = served.post("single/generate_stream", body)
    assert status == 200 and "DeadlineExceeded: " in text.splitlines()[-2]


def test_deadline_of_the_client(idle, pipe):
    with pytest.raises(DeadlineExceeded, match="timeout="):
        pipe("the", timeout=0.5, **LONG)
    with pytest.raises(DeadlineExceeded):
        list(pipe.stream("the", timeout=0.5, **LONG))


# ---- cancelled


@pytest.mark.parametrize("stream", [False, True])
def test_cancel_by_grpc(served, idle, pipe, stream):
    call = served.ask(request("single", "the", stream=stream, **LONG))
    time.sleep(0.3) if not stream else next(call)
    call.cancel()
    assert answered(pipe)


def test_cancel_while_queued(served, idle, pipe):
    with busy(served, waiting(), waiting()) as (running, *others):
        queued(served, 2)
        for call in others:
            call.cancel()
        late = request("single", "fox", max_tokens=2)
        for _ in range(50):  # until there is room to wait in again
            if failure(served.ask(request("single", "fox", {"timeout": 1000}))).startswith("DeadlineExceeded"):
                break
            time.sleep(0.1)
        else:
            pytest.fail("cancelled requests still wait")
        call = served.ask(late)
        running.cancel()
        assert len(answers(call)) == 1


def test_cancel_by_leaving_the_loop(idle, pipe):
    for _ in pipe.stream("the", **LONG):
        break
    assert answered(pipe)


def test_cancel_by_cancelling_the_task(served, idle, pipe):
    async def ask():
        async with served.async_pipeline("single") as own:
            task = asyncio.create_task(own("the", **LONG))
            await asyncio.sleep(0.3)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(ask())
    assert answered(pipe)


def test_cancel_by_closing_from_another_thread(idle, pipe):
    from client.generate import one
    from client.limits import Limits

    responses = pipe.transport.infer(pipe._request(one("the", LONG, stream=True)), Limits())
    next(responses)
    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(lambda: list(responses))
        time.sleep(0.2)
        responses.close()
        with pytest.raises(Cancelled):
            reading.result(10)
    assert answered(pipe)


def leave(served, path, seconds, **body):
    """Ask over HTTP and close the connection after so long; the first bytes of the answer until then."""
    text = json.dumps({"text_input": "the", **LONG, **body})
    head = f"POST /v2/models/single/{path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", served.http), 30) as connection:
        connection.sendall((head + text).encode())
        time.sleep(seconds)
        return connection.recv(1 << 16) if body.get("stream") else b""


def test_cancel_by_http_disconnect(served, idle, pipe):
    assert b"text_output" in leave(served, "generate_stream", 0.5, stream=True)
    assert answered(pipe)


def test_http_disconnect_without_stream(served, idle, pipe):
    """Triton 2.51 does not look at the connection before it has an answer to write: the time limit ends the request."""
    leave(served, "generate", 0.3, timeout=1_000_000)
    assert answered(pipe)
    leave(served, "generate_stream", 0.3, timeout=1_000_000)
    assert answered(pipe)


def test_neighbours_of_the_cancelled_keep_their_text(served):
    """Twenty streams, half of which leave after their first words."""
    with served.pipeline("tiny") as pipe:
        alone = [one.text for one in pipe([f"prompt {i}" for i in range(10)], max_tokens=60, seed=5)]

        def stream(i):
            pieces = pipe.stream(f"prompt {i % 10}", max_tokens=60 if i < 10 else 400, seed=5)
            return "".join(pieces) if i < 10 else next(pieces)

        with ThreadPoolExecutor(20) as threads:
            found = list(threads.map(stream, range(20)))
    assert found[:10] == alone


def test_errors_have_one_tree(served):
    """Whoever catches client.Error has caught all of them."""
    with served.pipeline("tiny", retries=0) as pipe:
        for wrong in ({"max_tokens": -1}, {"timeout": 0.001, "max_tokens": 400}, {"stop": ["x" * 2000]}):
            with pytest.raises(Error):
                pipe("the", **wrong)
