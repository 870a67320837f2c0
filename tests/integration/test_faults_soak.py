"""Two minutes of mixed load, clients that die, a rank of two that is killed: nothing grows. docs/faults.md, 17."""

import json
import os
import random
import re
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import shared_memory
import tiny_encoders
from guests import guest, metrics, tritonserver
from serving import eventually, gone

from backend import samples
from client import DeadlineExceeded, InvalidInput, Unavailable

SECONDS = float(os.environ.get("SOAK_SECONDS", "120"))
pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(3600)]
CLIENTS, RANKS = 6, 2
GROWTH = 48
"""MiB that server, stubs, ranks and files in /dev/shm may have gained together at the end, over the most before."""
NAME, EMBED, CLASSIFY = MODELS = "soaked", "soaked_embed", "soaked_classify"
TEXT = "the quick"
TEXTS = ["I loved the wonderful movie.", "that boring, terrible book!", "nobody knows", "good bad great awful"]


class Client:
    """One thread's requests, of every kind: `counts` says how many, `failed` what should not have been."""

    def __init__(self, served, number, expected, labels):
        self.served, self.rng, self.expected, self.known = served, random.Random(number), expected, labels
        self.pipe = served.pipeline(NAME, retries=0)
        self.embed, self.classify = served.of("embed", EMBED), served.of("classify", CLASSIFY)
        self.kinds = [
            self.whole, self.stream, self.leave, self.disconnect, self.vectors, self.labels, self.refused,
        ]  # fmt: skip
        self.counts, self.failed, self.gaps = Counter(), [], []

    def run(self, until):
        with self.pipe, self.embed, self.classify:
            while time.monotonic() < until:
                kind = self.rng.choice(self.kinds)
                try:
                    kind()
                    self.counts[kind.__name__] += 1
                except Unavailable:
                    self.counts["unavailable"] += 1
                    time.sleep(0.2)
                except Exception as error:
                    self.failed.append(f"{kind.__name__}: {type(error).__name__}: {error}"[:300])

    def whole(self):
        seed = self.rng.randrange(len(self.expected))
        assert self.pipe(TEXT, max_tokens=24, seed=seed).text == self.expected[seed]

    def stream(self):
        seed, pieces, times = self.rng.randrange(len(self.expected)), [], []
        for piece in self.pipe.stream(TEXT, max_tokens=24, seed=seed):
            pieces.append(piece)
            times.append(time.monotonic())
        assert "".join(pieces) == self.expected[seed]
        self.gaps += [later - earlier for earlier, later in pairwise(times)]

    def leave(self):
        with closing(self.pipe.stream("fox " * self.rng.randrange(1, 60), max_tokens=400)) as pieces:
            next(pieces)

    def disconnect(self):
        body = json.dumps({"text_input": "the", "stream": True, "max_tokens": 400, "timeout": 2_000_000})
        head = f"POST /v2/models/{NAME}/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self.served.http), 10) as connection:
            connection.sendall((head + body).encode())
            time.sleep(self.rng.random() / 10)

    def vectors(self):
        assert self.embed([f"text {self.rng.random()}" for _ in range(self.rng.randrange(1, 5))]).shape[1] == 384

    def labels(self):
        texts = self.rng.sample(TEXTS, self.rng.randrange(1, 5))
        assert best(self.classify, texts) == {text: self.known[text] for text in texts}

    def refused(self):
        with pytest.raises(InvalidInput):
            self.pipe("the", max_tokens=self.rng.choice([0, -5]))


def best(pipe, texts):
    """Each text's best label."""
    return {text: labels[0].label for text, labels in zip(texts, pipe(texts), strict=True)}


def soaked(served, task, name, folder, **parameters):
    """A model of the soak alone. 2.51 may never let go of it (docs/faults.md, 17), but no request is open then."""

    def leave(control, name):
        try:
            control.wait_gone(name, 30)
        except DeadlineExceeded:
            shown = {key: value for key, value in metrics(served).items() if f'"{name}"' in key}
            opened = {key: value for key, value in shown.items() if re.search("pending|running|waiting", key)}
            assert not any(opened.values()), shown

    return guest(served, task, name, folder, leave, **parameters)


def held(served):
    """What must not have grown at the end: processes and threads of the server, files in /dev/shm.

    Others than the soaked may become fewer meanwhile: guests of earlier tests that are still leaving.
    """
    stub, ranks = eventually(lambda: served.family(NAME), 30)
    return {
        "processes": len(list(served.processes())),
        "shared": len(shared(served)),
        "mapped": len(mapped(served)),
        "ranks": len(ranks),
        "stub's threads": stub.num_threads(),
    }


def shared(served):
    """The server's files in /dev/shm that have a name."""
    return list(Path("/dev/shm").glob(f"tritonspeed_{served.process.pid}_*"))


def mapped(served):
    """Those that its processes have mapped, DeepSpeed's buffers among them, which have lost their names."""
    found = set()
    for process in served.processes():
        with suppress(psutil.Error):  # it has just ended
            found |= {each.path for each in process.memory_maps() if each.path.startswith("/dev/shm/")}
    return found


def grown(before, after):
    return [what for what, count in after.items() if count > before[what]]


def settled(served, before, seconds=20):
    """What is held once nothing of it has grown, or after so long."""
    end = time.monotonic() + seconds
    while grown(before, found := held(served)) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def measured(served):
    """MiB of their own, threads and descriptors of the server, the models' stubs and ranks; MiB in /dev/shm."""
    found = {"tritonserver": tritonserver(served)}
    for name in MODELS:
        stub, ranks = eventually(lambda name=name: served.family(name), 30)
        found |= {f"{name} stub": stub} | {f"{name} rank {number}": rank for number, rank in enumerate(ranks)}
    sizes = {
        who: {"MiB": process.memory_full_info().uss >> 20, "threads": process.num_threads(), "files": process.num_fds()}
        for who, process in found.items()
    }
    files = shared(served)
    return sizes | {"/dev/shm": {"MiB": sum(512 * file.stat().st_blocks for file in files) >> 20, "files": len(files)}}


def gained(now, *before):
    """MiB in all, over the most that each had before: tritonserver gives some back and takes it again."""
    return sum(each["MiB"] - max(then[who]["MiB"] for then in before) for who, each in now.items())


def kill_a_rank(served):
    """The other one ends with it; wait until new ones serve."""
    said = len(served.said)
    ranks = eventually(lambda: served.family(NAME), 30)[1]
    assert len(ranks) == RANKS
    ranks[-1].kill()
    assert gone(ranks) == []
    eventually(lambda: f"{NAME} | ready in" in served.said[said:], 120)


def report(served, clients, **states):
    """For docs/performance.md."""
    counts = sum((client.counts for client in clients), Counter())
    gaps = sorted(gap for client in clients for gap in client.gaps)
    ends = {key: value for key, value in metrics(served).items() if NAME in key and "request_success_total" in key}
    line = {"seconds": SECONDS, "counts": counts, "ends": ends, "gaps": len(gaps)} | states
    if gaps:
        line["gap ms p50, p99, max"] = [round(1e3 * gaps[int(part * (len(gaps) - 1))], 1) for part in (0.5, 0.99, 1)]
    if where := os.environ.get("SOAK_REPORT"):
        Path(where).write_text(json.dumps(line, indent=1))
    return line


@pytest.fixture
def expected(served, tiny, tmp_path):
    """The models, and what they said before: texts by seed, labels by text. The KV cache is small: in use early."""
    small = {"max_sequences": "8", "max_model_len": "512", "num_blocks": "256", "tensor_parallel": RANKS}
    with (
        soaked(served, "generate", NAME, tiny, **small),
        soaked(served, "embed", EMBED, samples.fetch("embed")),
        soaked(served, "classify", CLASSIFY, tiny_encoders.write(tmp_path / "classify")),
    ):
        with served.pipeline(NAME) as pipe, served.of("classify", CLASSIFY) as classify:
            said = [pipe(TEXT, max_tokens=24, seed=seed).text for seed in range(4)], best(classify, TEXTS)
        yield said


def test_soak(served, expected):
    begin = time.monotonic()
    clients = [Client(served, number, *expected) for number in range(CLIENTS)]
    with ThreadPoolExecutor(CLIENTS) as threads:
        running = [threads.submit(client.run, begin + SECONDS) for client in clients]
        time.sleep(SECONDS / 4)
        before, early = held(served), measured(served)
        kill_a_rank(served)
        served_again = time.monotonic() - begin
        time.sleep(max(SECONDS / 8, SECONDS / 2 - served_again))  # new ranks have taken what they need
        then = measured(served)
        for each in running:
            each.result()
    with served.pipeline(NAME) as pipe:
        assert pipe(TEXT, max_tokens=24, seed=0).text == expected[0][0]
    after, now = settled(served, before), measured(served)
    said = report(served, clients, before=before, after=after, early=early, middle=then, end=now)
    assert [line for client in clients for line in client.failed] == [], said
    assert all(sum(client.counts[kind.__name__] for client in clients) for kind in clients[0].kinds), said
    assert not grown(before, after), said
    assert shared_memory.forgotten(("deepspeed_allreduce_buffer_",), served.before) == [], said
    assert gained(now, early, then) < GROWTH, said
    assert all(now[who]["files"] <= then[who]["files"] + CLIENTS for who in now), said
