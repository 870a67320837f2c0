"""Ranks that hang, servers that are told to stop, models that cannot start. docs/faults.md, 3, 8, 10 and 21."""

import os
import re
import shutil
import signal
import subprocess
import threading
import time
import urllib.request
from collections import Counter

import pytest
import serving
from guests import guest, memory, tritonserver
from serving import Served, answers, eventually, gone, request

from backend import repository
from backend.launcher.health import BEAT
from client import InvalidInput, models

pytestmark = pytest.mark.server

LONG = {"max_tokens": 8000, "ignore_eos": True}
GREEDY = {"max_tokens": 20, "temperature": 0.0}
LOADS = int(os.environ.get("LOADS", "5"))


def text(served, name, **given):
    (answer,) = answers(served.ask(request(name, "the quick", **GREEDY, **given)))
    return answer["text_output"].item()


def test_a_rank_that_hangs_is_replaced(served, tiny):
    """The watchdog's limit is three seconds here; the neighbours go on, and the model comes back by itself."""
    with guest(served, "generate", "hanging", tiny, step_timeout=3) as name:
        before, (_, (rank,)) = text(served, name), served.family(name)
        call = served.ask(request(name, "the", stream=True, **LONG))
        next(call)
        rank.send_signal(signal.SIGSTOP)
        said = len(served.said)
        assert text(served, "tiny")
        *_, last = call
        assert re.match(r"EngineDown: rank 0 has not answered for 3 s; the model is restarting", last.error_message)
        assert gone([rank]) == []
        assert eventually(lambda: f"{name} | ready in" in served.said[said:], 90)
        assert text(served, name) == before


def test_a_model_that_cannot_be_restarted_stays_failed_and_the_others_serve(served, tiny, tmp_path):
    """Its weights are gone when a rank dies; with them back, it comes back."""
    folder = tmp_path / "tiny"
    shutil.copytree(tiny, folder)
    weights, aside = folder / "model.safetensors", folder / "aside"
    with guest(served, "generate", "failing", folder, max_restarts=2, restart_backoff=0.1) as name:
        before, (_, (rank,)) = text(served, name), served.family(name)
        eventually(lambda: served.health() is None)
        weights.rename(aside)
        rank.kill()
        eventually(lambda: served.health() == f"model {name}: down: rank 0 was killed by SIGKILL")
        reason = f"{folder} holds no weights: expected model.safetensors or model.safetensors.index.json"
        eventually(lambda: indexed(served, name) == ("UNAVAILABLE", reason), 90)
        said = f"{name} | has failed for good (rank 0 was killed by SIGKILL): loading it anew"
        assert said in served.said
        lost = f"model {name}: failed for good: '{name}' could not be loaded: {reason}"
        eventually(lambda: served.health() == lost)
        assert gone(served.processes(f"/{name}/")) == [] and text(served, "tiny")
        aside.rename(weights)
        eventually(lambda: indexed(served, name) == ("READY", ""), 180)
        assert text(served, name) == before
        eventually(lambda: served.health() is None)


def indexed(served, name):
    """Its state and reason in the repository index."""
    (found,) = [each for each in models(host="127.0.0.1", port=served.port) if each.name == name]
    return found.state, found.reason


def test_a_rank_that_hangs_while_idle_is_replaced_without_traffic(served, tiny):
    with guest(served, "generate", "dozing", tiny, heartbeat_timeout=1) as name:
        before, (_, (rank,)) = text(served, name), served.family(name)
        with urllib.request.urlopen(f"http://127.0.0.1:{served.metrics}/metrics", timeout=10) as answer:
            assert name in [model for model, _ in BEAT.findall(answer.read().decode())]
        rank.send_signal(signal.SIGSTOP)
        eventually(lambda: served.health() == f"model {name}: down: rank 0 has given no sign of life for 1 s")
        assert gone([rank]) == []
        eventually(lambda: served.health() is None, 90)
        assert text(served, name) == before


def test_loads_and_unloads_leak_nothing(served, tiny):
    """Five of them; LOADS=50 for the count in docs/faults.md. What the first ones leave may be caches."""
    triton = tritonserver(served)

    def load_and_unload():
        with guest(served, "generate", "passing", tiny) as name:
            assert text(served, name)

    def held():
        processes = Counter(process.name() for process in served.processes())
        ours = [file for file in os.listdir("/dev/shm") if file.startswith(f"tritonspeed_{served.process.pid}_")]
        return triton.num_fds(), triton.num_threads(), processes, set(ours), sockets(triton)

    load_and_unload()
    load_and_unload()
    first, begin = settled(held), memory(triton)
    for _ in range(LOADS):
        load_and_unload()
    eventually(lambda: left(held(), first) == [])
    assert memory(triton) - begin < 8 + LOADS  # MiB


def left(now, before):
    """What there is more of, and what there was: of Triton's threads and descriptors, which connections take, LOADS."""
    pairs = zip(now, before, strict=True)
    return [(new, old) for new, old in pairs if not (new < old + LOADS if isinstance(new, int) else new <= old)]


def settled(look, seconds=2):
    """What it sees once that has stayed the same for so long: what others have just ended takes a moment to go."""
    seen, since = look(), time.monotonic()
    while time.monotonic() - since < seconds:
        time.sleep(0.2)
        if (now := look()) != seen:
            seen, since = now, time.monotonic()
    return seen


def sockets(process):
    return {str(each.laddr) for each in process.net_connections() if each.status == "LISTEN"}


# ---- told to stop


@pytest.fixture
def start(tmp_path, tiny):
    """A server of one tiny model, not waited for."""
    servers = []
    repository.write(tmp_path / "models", "generate", "tiny", {"model": str(tiny), "max_sequences": "4"})

    def start(*arguments):
        servers.append(server := Served(tmp_path / f"served{len(servers)}", tmp_path / "models", *arguments))
        return server

    yield start
    for server in servers:
        server.stop(signal.SIGKILL)


def test_sigterm_while_a_model_loads(start):
    server = start()
    eventually(lambda: server.processes("backend.ranks.rank"), 60)
    assert server.stop(signal.SIGTERM) == 0
    assert server.left() == []


def test_sigterm_lets_streams_finish_and_a_second_one_does_not(start):
    server = start("--drain-seconds=120").wait()
    whole = {"max_tokens": 400, "seed": 3, "ignore_eos": True}
    (alone,) = answers(server.ask(request("tiny", "the", exclude_input_in_output=True, **whole)))
    short, endless = (server.ask(request("tiny", "the", stream=True, **given)) for given in (whole, LONG))
    for call in (short, endless):
        next(call)
    server.process.send_signal(signal.SIGTERM)
    eventually(lambda: "stopping" in server.said, 10)
    pieces = [piece for answer in answers(short) for piece in answer["text_output"].ravel()]
    assert pieces and alone["text_output"].item().endswith("".join(pieces))
    assert server.process.poll() is None
    assert server.stop(signal.SIGTERM) == 0
    assert server.left() == []


def test_sigterm_with_a_stream_that_ends(start):
    server = start("--drain-seconds=120").wait()
    call = server.ask(request("tiny", "the", stream=True, max_tokens=600, ignore_eos=True))
    next(call)
    found = []
    reading = threading.Thread(target=lambda: found.extend(call))
    reading.start()
    server.process.send_signal(signal.SIGTERM)
    reading.join(60)
    assert found and not any(message.error_message for message in found)
    assert found[-1].infer_response.parameters["triton_final_response"].bool_param
    assert server.process.wait(60) == 0
    assert server.left() == []


# ---- models that cannot start


@pytest.fixture(scope="module")
def corrupt(tiny, tmp_path_factory):
    """Half of the weights are missing."""
    folder = tmp_path_factory.mktemp("corrupt") / "tiny"
    shutil.copytree(tiny, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return folder


@pytest.mark.parametrize("name", ["corrupt", "gpu"])
def test_what_cannot_start_says_why_in_a_line(served, tiny, corrupt, name):
    if name == "gpu" and shutil.which("nvidia-smi"):
        pytest.skip("there is a GPU")
    given, reason = {
        "corrupt": ({"model": str(corrupt)}, "model.safetensors is corrupt or truncated"),
        "gpu": ({"model": str(tiny), "device": "cuda"}, "device is cuda, but no NVIDIA GPU is visible"),
    }[name]
    folder = repository.write(served.repository, "generate", name, given)
    try:
        with served.control() as control, pytest.raises(InvalidInput, match=reason):
            control.load(name, 60)
        (found,) = [each for each in models(host="127.0.0.1", port=served.port) if each.name == name]
        assert found.state == "UNAVAILABLE" and reason in found.reason and "\n" not in found.reason
        assert gone(served.processes(f"/{name}/")) == []
        assert text(served, "tiny")
    finally:
        shutil.rmtree(folder)


def _unshare(*line):
    return ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=40m tmpfs /dev/shm && exec "$@"', "sh", *line]


@pytest.fixture
def little_shared_memory(monkeypatch):
    """Servers get a /dev/shm of their own of 40 MiB."""
    if subprocess.run(_unshare("true"), capture_output=True, check=False).returncode:
        pytest.skip("namespaces are not permitted here")
    start = subprocess.Popen
    monkeypatch.setattr(serving.subprocess, "Popen", lambda line, **more: start(_unshare(*line), **more))


@pytest.mark.usefixtures("little_shared_memory")
def test_no_room_in_shared_memory(tmp_path, tiny):
    """For two ranks there is none, for one there is: that one is served."""
    for name, ranks in (("one", "1"), ("two", "2")):
        repository.write(
            tmp_path / "models", "generate", name, {"model": str(tiny), "tensor_parallel": ranks, "max_sequences": "4"}
        )
    server = Served(tmp_path / "served", tmp_path / "models", "--keep-going")
    try:
        server.wait()
        assert "two | failed: LoadError: /dev/shm has " in server.said
        assert "MiB free; 2 ranks need 134 MiB" in server.said
        assert text(server, "one")
        assert gone(server.processes("/two/")) == []
        assert len(server.processes("backend.ranks.rank")) == 1
        time.sleep(0.1)
    finally:
        status = server.stop()
    assert status == 0 and server.left() == []
