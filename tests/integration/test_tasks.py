"""Tasks of one answer a request in a real tritonserver, on the sample for embed: batching, cache, limits, failures."""

import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.grpc.model_config_pb2 import ModelConfig
from tritonclient.utils import InferenceServerException

sys.path.insert(0, str(Path(__file__).parent))
from serving import eventually, gone, running

from backend import repository, samples

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """embed; and narrow: one request at a time, of which two may wait."""
    models, model = tmp_path_factory.mktemp("repository"), str(samples.fetch("embed"))
    repository.write(models, "embed", "embed", {"model": model})
    _narrow(repository.write(models, "embed", "narrow", {"model": model}) / "config.pbtxt")
    with running(tmp_path_factory.mktemp("served"), models, "--explicit", "--keep-going") as server:
        yield server


def _narrow(path):
    config = text_format.Parse(path.read_text(), ModelConfig())
    config.max_batch_size = 64
    config.dynamic_batching.default_queue_policy.max_queue_size = 2
    path.write_text(text_format.MessageToString(config))


def ask(server, texts, model="embed", timeout=None, **options):
    given = {"text": np.array([[text.encode()] for text in texts], object)}
    given |= {name: np.array([[value]] * len(texts)) for name, value in options.items()}
    tensors = []
    for name, values in given.items():
        kind = {"b": "BOOL", "O": "BYTES"}[values.dtype.kind]
        tensors.append(InferInput(name, values.shape, kind))
        tensors[-1].set_data_from_numpy(values)
    with InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        return client.infer(model, tensors, timeout=timeout, client_timeout=30).as_numpy("embedding")


def tried(server, *given, **options):
    try:
        return ask(server, *given, **options)
    except InferenceServerException as error:
        return error


def counters(server, model="embed"):
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {line.split("{")[0]: float(line.split()[-1]) for line in lines if f'model="{model}"' in line}


def test_the_known_pair(server):
    first, second = ask(server, ["That is a happy person", "That is a very happy person"])
    assert first @ second == pytest.approx(0.943, abs=1e-3)


def test_http_infer_and_generate(server):
    tensor = {"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": ["over http"]}
    assert server.post("embed/infer", {"inputs": [tensor]})[0] == 200
    assert server.post("embed/generate", {"text": "over http"})[0] == 200
    status, text = server.post("embed/generate", {"text": "over http", "dimensions": 9999})
    assert status == 400 and "InvalidInput: dimensions" in text


LONG = [f"{j} " + "long " * 200 for j in range(64)]
"""A request that takes seconds."""


def test_requests_are_gathered_and_a_bad_one_fails_alone(server):
    """They are sent behind one that lets Triton's queue grow."""
    before = counters(server)
    texts = ["word " * 2000 if i % 8 == 0 else f"text number {i}" for i in range(64)]
    with ThreadPoolExecutor(65) as pool:
        slow = pool.submit(ask, server, LONG)
        found = list(pool.map(lambda text: tried(server, [text], truncate=False), texts))
        assert slow.result().shape == (64, 384)
    after = counters(server)
    for i, answer in enumerate(found):
        if i % 8 == 0:
            assert "InvalidInput: the text has 2002 tokens" in str(answer)
        else:
            assert np.array_equal(answer.shape, (1, 384))
    assert after["nv_inference_exec_count"] - before["nv_inference_exec_count"] < 32


def test_a_failure_that_repeats_stays_one(server):
    """Triton's response cache keeps failures and answers them as successes without outputs: it must be off."""
    for _ in range(3):
        assert "InvalidInput: the text has 2002 tokens" in str(tried(server, ["word " * 2000], truncate=False))


def crowd(server, **options):
    """Sixty requests of many texts at once, to a queue of two."""
    texts = [[f"{i} {j} " + "long " * 200 for j in range(16)] for i in range(24)]
    with ThreadPoolExecutor(24) as pool:
        return list(pool.map(lambda each: tried(server, each, "narrow", **options), texts))


def test_queue_overflow_is_refused(server):
    failures = [found for found in crowd(server) if isinstance(found, Exception)]
    assert 0 < len(failures) < 24
    assert {error.status() for error in failures} == {"StatusCode.UNAVAILABLE"}


def test_what_waits_too_long_in_the_queue_is_refused(server):
    failures = [found for found in crowd(server, timeout=1000) if isinstance(found, Exception)]
    late = [error for error in failures if "timeout" in str(error).lower()]
    assert late and {error.status() for error in late} == {"StatusCode.UNAVAILABLE"}
    with server.of("embed", "narrow") as pipe:  # it works on
        assert pipe("afterwards").shape == (384,)


def ended(server, reason, model="embed"):
    """How many requests have ended so."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    labels = (f'model="{model}"', f'finished_reason="{reason}"')
    own = [line for line in lines if line.startswith("vllm:request_success_total{") and all(x in line for x in labels)]
    return float(own[0].split()[-1]) if own else 0.0


def test_a_time_limit_ends_what_is_computed(server):
    error = tried(server, LONG, timeout=300_000)
    assert error.status() == "StatusCode.UNAVAILABLE" and "DeadlineExceeded: the request's time limit" in str(error)
    assert ask(server, ["afterwards"]).shape == (1, 384)


def under_way(server):
    """To be called once idle; what it returns waits until the rank of embed computes again."""
    _, (rank,) = server.family("embed")
    idle = rank.cpu_times().user
    return lambda: eventually(lambda: rank.cpu_times().user > idle + 0.1)


def test_who_leaves_is_computed_no_more(server):
    before, begun = ended(server, "cancelled"), under_way(server)
    tensor = InferInput("text", [64, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[text.encode()] for text in LONG], object))
    with InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        call = client.async_infer("embed", [tensor], callback=lambda result, error: None)
        begun()
        call.cancel()
        eventually(lambda: ended(server, "cancelled") == before + 1)
    assert ask(server, ["afterwards"]).shape == (1, 384)


def test_overflow_over_http_is_503(server):
    tensor = {"name": "text", "datatype": "BYTES", "shape": [16, 1], "data": ["long " * 200] * 16}
    with ThreadPoolExecutor(24) as pool:
        found = [*pool.map(lambda _: server.post("narrow/infer", {"inputs": [tensor]}), range(24))]
    assert {status for status, _ in found} == {200, 503}


def test_a_killed_rank_fails_what_is_under_way_and_comes_back(server):
    _, (rank,) = server.family("embed")
    expected = ask(server, ["before the end"])
    begun = under_way(server)
    with ThreadPoolExecutor(8) as pool:
        texts = [[f"{i} {j} " + "long " * 100 for j in range(48)] for i in range(8)]
        waiting = [pool.submit(tried, server, each) for each in texts]
        begun()
        rank.kill()
        failures = [found for each in waiting if isinstance(found := each.result(), Exception)]
    assert failures and {error.status() for error in failures} == {"StatusCode.UNAVAILABLE"}
    assert all("EngineDown: " in str(error) for error in failures)
    assert not gone([rank])
    eventually(lambda: isinstance(found := tried(server, [f"after {time.time()}"]), np.ndarray) and found.shape)
    assert np.allclose(ask(server, ["before the end"]), expected)


def test_the_cache_answers_what_repeats_where_it_is_asked_for(tmp_path_factory):
    models = tmp_path_factory.mktemp("repository")
    repository.write(models, "embed", "embed", {"model": str(samples.fetch("embed"))})
    with running(tmp_path_factory.mktemp("cached"), models, "--cache-mib", "16") as server:
        first, other, again = (ask(server, [text]) for text in ("the same", "another", "the same"))
        found = counters(server)
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert found["nv_cache_num_hits_per_model"] == 1 and found["nv_cache_num_misses_per_model"] == 2
    assert found["nv_inference_exec_count"] == 2


def test_unload_leaves_no_process(server):
    stub, ranks = server.family("narrow")
    with server.control() as control:
        control.unload("narrow", 30)
        control.wait_gone("narrow", 30)
    assert not gone([stub, *ranks])
