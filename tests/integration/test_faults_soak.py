"""A minute of mixed load with clients that die and a rank that is killed: nothing grows. docs/faults.md, 17."""

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

import pytest
from guests import guest, metrics, tritonserver
from serving import eventually, gone

from backend import samples
from client import DeadlineExceeded, InvalidInput, Unavailable

SECONDS = float(os.environ.get("SOAK_SECONDS", "30"))
pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(3600)]
CLIENTS = 6
GROWTH = 48
"""MiB that server, stub and ranks may have gained together between the middle and the end."""


class Client:
    """One thread's requests, of every kind: `counts` says how many, `failed` what should not have been."""

    def __init__(self, served, name, number, expected):
        self.served, self.name, self.rng, self.expected = served, name, random.Random(number), expected
        self.pipe, self.embed = served.pipeline(name, retries=0), served.of("embed", "soaked_embed")
        self.kinds = [self.whole, self.stream, self.leave, self.disconnect, self.vectors, self.refused]
        self.counts, self.failed, self.gaps = Counter(), [], []

    def run(self, until):
        with self.pipe, self.embed:
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
        assert self.pipe("the quick", max_tokens=24, seed=seed).text == self.expected[seed]

    def stream(self):
        seed, pieces, times = self.rng.randrange(len(self.expected)), [], []
        for piece in self.pipe.stream("the quick", max_tokens=24, seed=seed):
            pieces.append(piece)
            times.append(time.monotonic())
        assert "".join(pieces) == self.expected[seed]
        self.gaps += [later - earlier for earlier, later in pairwise(times)]

    def leave(self):
        with closing(self.pipe.stream("fox " * self.rng.randrange(1, 60), max_tokens=400)) as pieces:
            next(pieces)

    def disconnect(self):
        body = json.dumps({"text_input": "the", "stream": True, "max_tokens": 400, "timeout": 2_000_000})
        head = f"POST /v2/models/{self.name}/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self.served.http), 10) as connection:
            connection.sendall((head + body).encode())
            time.sleep(self.rng.random() / 10)

    def vectors(self):
        assert self.embed([f"text {self.rng.random()}" for _ in range(self.rng.randrange(1, 5))]).shape[1] == 384

    def refused(self):
        with pytest.raises(InvalidInput):
            self.pipe("the", max_tokens=self.rng.choice([0, -5]))


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


def held(served, name):
    """What must not have grown at the end: processes and threads of the server, names in /dev/shm.

    Others than the soaked may become fewer meanwhile: guests of earlier tests that are still leaving.
    """
    prefix = f"tritonspeed_{served.process.pid}_"
    stub, ranks = eventually(lambda: served.family(name), 30)
    return {
        "processes": len(list(served.processes())),
        "shared": sum(file.startswith(prefix) for file in os.listdir("/dev/shm")),
        "ranks": len(ranks),
        "stub's threads": stub.num_threads(),
    }


def grown(before, after):
    return [what for what, count in after.items() if count > before[what]]


def measured(served, name):
    """MiB of their own, threads and descriptors of the server, the model's stub and its ranks."""
    stub, ranks = eventually(lambda: served.family(name), 30)
    found = {"tritonserver": tritonserver(served), "stub": stub}
    found |= {f"rank {number}": rank for number, rank in enumerate(ranks)}
    return {
        who: {"MiB": process.memory_full_info().uss >> 20, "threads": process.num_threads(), "files": process.num_fds()}
        for who, process in found.items()
    }


def total(measures, what):
    return sum(each[what] for each in measures.values())


def kill_a_rank(served, name):
    """And wait until others serve."""
    said = len(served.said)
    family = eventually(lambda: served.family(name), 30)[1]
    family[-1].kill()
    assert gone(family[-1:]) == []
    eventually(lambda: f"{name} | ready in" in served.said[said:], 120)


def report(served, name, clients, **states):
    """For docs/performance.md."""
    counts = sum((client.counts for client in clients), Counter())
    gaps = sorted(gap for client in clients for gap in client.gaps)
    ends = {key: value for key, value in metrics(served).items() if name in key and "request_success_total" in key}
    line = {"seconds": SECONDS, "counts": counts, "ends": ends, "gaps": len(gaps)} | states
    if gaps:
        line["gap ms p50, p99, max"] = [round(1e3 * gaps[int(part * (len(gaps) - 1))], 1) for part in (0.5, 0.99, 1)]
    if where := os.environ.get("SOAK_REPORT"):
        Path(where).write_text(json.dumps(line, indent=1))
    return line


def test_soak(served, tiny):
    """The KV cache is small, so that it is all in use early."""
    small = {"max_sequences": "8", "max_model_len": "512", "num_blocks": "256"}
    with (
        soaked(served, "generate", "soaked", tiny, **small) as name,
        soaked(served, "embed", "soaked_embed", samples.fetch("embed")),
    ):
        with served.pipeline(name) as pipe:
            expected = [pipe("the quick", max_tokens=24, seed=seed).text for seed in range(4)]
        begin = time.monotonic()
        clients = [Client(served, name, number, expected) for number in range(CLIENTS)]
        with ThreadPoolExecutor(CLIENTS) as threads:
            running = [threads.submit(client.run, begin + SECONDS) for client in clients]
            time.sleep(SECONDS / 4)
            before, early = held(served, name), measured(served, name)
            kill_a_rank(served, name)
            time.sleep(max(0.0, SECONDS / 2 - (time.monotonic() - begin)))
            then = measured(served, name)
            for each in running:
                each.result()
        with served.pipeline(name) as pipe:
            assert pipe("the quick", max_tokens=24, seed=0).text == expected[0]
        with suppress(AssertionError):
            eventually(lambda: not grown(before, held(served, name)), 20)
        after, now = held(served, name), measured(served, name)
        said = report(served, name, clients, before=before, after=after, early=early, middle=then, end=now)
        assert [line for client in clients for line in client.failed] == [], said
        assert all(sum(client.counts[kind.__name__] for client in clients) for kind in clients[0].kinds), said
        assert not grown(before, after), said
        assert total(now, "MiB") - total(then, "MiB") < GROWTH, said
        assert all(now[who]["files"] <= then[who]["files"] + CLIENTS for who in now), said
