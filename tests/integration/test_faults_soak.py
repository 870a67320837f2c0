"""A minute of mixed load with clients that die and a rank that is killed: nothing grows. docs/faults.md, 17."""

import json
import os
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress

import pytest
from guests import guest, memory, tritonserver
from serving import eventually, gone

from backend import samples
from client import InvalidInput, Unavailable

SECONDS = float(os.environ.get("SOAK_SECONDS", "0"))
pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not SECONDS, reason="unloading after it took over 60 s in one run of four: set SOAK_SECONDS=60"),
]
CLIENTS = 6
GROWTH = 48
"""MiB that server, stubs and ranks may have gained together between the first quarter and the end."""


class Client:
    """One thread's requests, of every kind; `counts` says how many."""

    def __init__(self, served, name, number, expected):
        self.served, self.name, self.rng, self.expected = served, name, random.Random(number), expected
        self.pipe, self.embed = served.pipeline(name, retries=0), served.of("embed", "soaked_embed")
        self.kinds = [self.whole, self.stream, self.leave, self.disconnect, self.vectors, self.refused]
        self.counts = dict.fromkeys([kind.__name__ for kind in self.kinds] + ["unavailable"], 0)

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
        return self.counts

    def whole(self):
        seed = self.rng.randrange(len(self.expected))
        assert self.pipe("the quick", max_tokens=24, seed=seed).text == self.expected[seed]

    def stream(self):
        seed = self.rng.randrange(len(self.expected))
        assert "".join(self.pipe.stream("the quick", max_tokens=24, seed=seed)) == self.expected[seed]

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


def test_soak(served, tiny):
    """The KV cache is small, so that it is all in use early."""
    with (
        guest(served, "generate", "soaked", tiny, max_sequences=8, max_model_len=512, num_blocks=256) as name,
        guest(served, "embed", "soaked_embed", samples.fetch("embed")),
    ):
        with served.pipeline(name) as pipe:
            expected = [pipe("the quick", max_tokens=24, seed=seed).text for seed in range(4)]
        begin = time.monotonic()
        with ThreadPoolExecutor(CLIENTS) as threads:
            clients = [Client(served, name, number, expected) for number in range(CLIENTS)]
            running = [threads.submit(client.run, begin + SECONDS) for client in clients]
            time.sleep(SECONDS / 4)
            before, family = held(served, name), [tritonserver(served), *served.family(name)[1]]
            said = len(served.said)
            family[-1].kill()
            assert gone(family[-1:]) == []
            eventually(lambda: f"{name} | ready in" in served.said[said:], 120)
            time.sleep(max(0.0, SECONDS / 2 - (time.monotonic() - begin)))
            watched = [tritonserver(served), served.family(name)[0], *served.family(name)[1]]
            then, files = memory(*watched), [process.num_fds() for process in watched]
            counts = [each.result() for each in running]
        assert all(count for name, count in sums(counts).items() if name != "unavailable"), counts
        with served.pipeline(name) as pipe:
            assert pipe("the quick", max_tokens=24, seed=0).text == expected[0]
        with suppress(AssertionError):
            eventually(lambda: not grown(before, held(served, name)), 20)
        assert not grown(before, held(served, name)), (before, held(served, name))
        assert memory(*watched) - then < GROWTH
        now = [process.num_fds() for process in watched]
        assert all(last <= most + CLIENTS for last, most in zip(now, files, strict=True))


def sums(counts):
    return {name: sum(each[name] for each in counts) for name in counts[0]}
