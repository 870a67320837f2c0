"""Processes that are killed: every stream hears of it, the model comes back, and nothing stays behind."""

import signal
import threading
import time

import grpc
import psutil
import pytest
from guests import queued
from serving import Served, answers, eventually, failure, gone, request

from backend import repository
from client import Unavailable

pytestmark = pytest.mark.server

LONG = {"max_tokens": 8000, "ignore_eos": True}
WITHIN = 5
"""Seconds in which everybody has heard of a dead rank."""


@pytest.fixture
def restarted(served):
    """Waits until a model answers again, as before."""

    def wait(name):
        with served.pipeline(name, retries=0) as pipe:
            return eventually(lambda: answer(pipe), 90)

    return wait


def answer(pipe):
    try:
        return pipe("the quick", max_tokens=5, temperature=0.0).text
    except Unavailable:
        return ""


def heard(call, errors):
    *_, last = call
    errors.append((last.error_message, time.monotonic()))


def test_a_rank_killed_in_mid_stream(served, restarted):
    """What is generated ends with EngineDown in time; what waits is answered by the new ranks, as ever."""
    before = restarted("single")
    running = served.ask(request("single", "the", stream=True, **LONG))
    next(running)
    waiting = [served.ask(request("single", "the quick", max_tokens=5, temperature=0.0)) for _ in range(2)]
    queued(served, 2)
    (rank,) = served.family("single")[1]
    errors = []
    thread = threading.Thread(target=heard, args=(running, errors))
    thread.start()
    killed = time.monotonic()
    rank.kill()
    thread.join(60)
    ((text, when),) = errors
    assert text == "EngineDown: rank 0 was killed by SIGKILL; the model is restarting, try again later"
    assert when - killed < WITHIN

    assert failure(served.ask(request("single", "the"))).startswith("EngineDown: the model is restarting")
    status, text = served.post("single/generate", {"text_input": "the"})
    assert status >= 400 and "EngineDown: " in text
    with served.pipeline("tiny") as pipe:
        assert pipe("the", max_tokens=1).num_output_tokens == 1  # the other models have noticed nothing
    for call in waiting:
        (kept,) = answers(call)
        assert kept["text_output"].item() == "the quick" + before
    assert restarted("single") == before
    assert served.family("single")[1] != [rank]


def test_a_rank_killed_while_idle_is_noticed_without_traffic(served, restarted):
    (rank,) = served.family("single")[1]
    said = len(served.said)
    rank.kill()
    assert eventually(lambda: "single | down: rank 0 was killed by SIGKILL" in served.said[said:], WITHIN)
    assert eventually(lambda: "single | ready in" in served.said[said:], 90)
    assert restarted("single")


def test_a_killed_stub(served, restarted):
    """Its ranks go with it; unload and load bring the model back."""
    before = restarted("single")
    stub, ranks = served.family("single")
    stub.kill()
    assert gone(ranks) == []
    with served.control() as control:
        control.unload("single", 60)
        control.load("single", 120)
    assert restarted("single") == before


@pytest.fixture
def start(tmp_path, tiny):
    """Servers of one tiny model, in the same folder for running servers."""
    servers = []
    repository.write(tmp_path / "models", "generate", "tiny", {"model": str(tiny), "max_sequences": "2"})

    def start(name):
        servers.append(server := Served(tmp_path / name, tmp_path / "models", run=tmp_path / "run"))
        return server.wait()

    yield start
    for server in servers:
        server.stop(signal.SIGKILL)


def test_killed_servers_and_ctrl_c_with_an_open_stream(start):
    """A launcher killed -9 takes all with it; the next one sweeps up, and Ctrl-C leaves nothing of either."""
    first = start("first")
    processes = first.processes()
    assert {"tritonserver", "triton_python_backend_stub"} <= {p.name()[:26] for p in processes} and len(processes) >= 4
    calls = [first.ask(request("tiny", "the", stream=True, **LONG)) for _ in range(2)]
    for call in calls:
        next(call)
    time.sleep(0.3)  # long enough for the stub to ask whether they are still there
    first.process.kill()
    assert gone(processes, WITHIN) == []

    second = start("second")
    assert first.left() == []
    call = second.ask(request("tiny", "the", stream=True, **LONG))
    next(call)
    assert second.stop(signal.SIGINT) == 0
    assert second.left() == []
    with pytest.raises(grpc.RpcError):
        list(call)


def test_a_killed_tritonserver(start):
    """The launcher says so, and ends everything."""
    server = start("only")
    (triton,) = [p for p in server.processes() if p.name() == "tritonserver"]
    others = [p for p in server.processes() if p.pid != server.process.pid]
    triton.kill()
    assert gone(others, WITHIN) == []
    assert server.process.wait(20) == 1
    assert eventually(lambda: "error: tritonserver ended (signal 9)" in server.said)
    assert server.left() == []
    assert not psutil.pid_exists(triton.pid)
