"""Thousands of hostile requests, drawn with a seed: an answer or the caller's own fault, each; nothing dies of them.

2,000 of them in the suite; HOSTILE=100000 for the count in docs/faults.md.
"""

import http.client
import json
import os
import random
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import tiny_encoders
from guests import counter, guest
from serving import answers, eventually, request
from test_errors import BAD, BAD_JSON, BAD_PROMPTS, REFUSED_BY_TRITON
from tritonclient.grpc import service_pb2

from client import errors

pytestmark = [pytest.mark.server, pytest.mark.timeout(3600)]

MANY = int(os.environ.get("HOSTILE", "2000"))
SEED = int(os.environ.get("HOSTILE_SEED", "1"))
LINES, TOGETHER = 4, 25
"""Connections, and requests that are under way on each."""
KNOWN = ("InvalidInput", "Overloaded", "DeadlineExceeded")
TRITONS_OWN = re.compile(
    r"unable to find data for input tensor|already exists in request|has no shape but model requires"
    r"|input byte size mismatch|invalid value type for '|parameter keys starting with 'triton_' are reserved"
    r"|string correlation ID cannot be longer|All input dimensions should be specified|invalid value for 'priority'"
    r"|(failed|[Uu]nable) to parse|attempt to access JSON"
)
"""What 2.51 refuses before a backend hears of it, as its own INTERNAL or 500; our client sends nothing of the kind."""
FEW = {"max_tokens": 2}
GOOD = {
    "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7, "stop": ["Q", "R"], "n": 2,
    "stop_token_ids": [3, 4], "stream": False, "repetition_penalty": 1.1, "priority": 1, "cache_salt": "s",
    "return_logprobs": True, "timeout": 5_000_000,
}  # fmt: skip
VALUES = [None, True, -1, 0, 1, 2**31, 2**64, 1e308, "", "1", "nan", [], [[]], {}, "\0", "\ud800", "é" * 3000, [None]]
TENSORS = ["i1", "i2", "i4", "i8", "u1", "u8", "f2", "f4", "f8", "?", "O"]


class Hostile:
    """Requests to a model that generates and to one that embeds, and HTTP bodies; the same for the same seed."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.kinds = [self.value, self.two_values, self.json, self.torn_json, self.any_json, self.prompt,
                      self.parameter, self.tensors, self.any_tensor, self.torn]  # fmt: skip

    def generate(self):
        """A request, and whether it has to be refused."""
        return self.rng.choice(self.kinds)()

    def value(self):
        name, value = self.rng.choice(BAD)
        return self._asked({name: value}), True

    def two_values(self):
        pairs = dict(self.rng.sample(BAD, 2))
        return self._asked(pairs), True

    def json(self):
        return self._asked({"sampling_parameters": self.rng.choice(BAD_JSON)}), True

    def torn_json(self):
        return self._asked({"sampling_parameters": self.tear(json.dumps(GOOD).encode())}), False

    def any_json(self):
        name, value = self.rng.choice([*GOOD, "bogus", "\x1b[31m", ""]), self.rng.choice(VALUES)
        return self._asked({"sampling_parameters": json.dumps({name: value})}), False

    def prompt(self):
        return request("tiny", **self.rng.choice(BAD_PROMPTS)), True

    def parameter(self):
        name = self.rng.choice([*GOOD, "bogus", "sequence_id", "triton_x", "x-request-id", ""])
        given = self.rng.choice([True, -1, 0, 2**40, -0.5, 1e300, "", "x", "\0", "[1", "9" * 5000])
        return request("tiny", "a", {name: given}, **FEW), False

    def tensors(self):
        return request("tiny", **self.rng.choice(REFUSED_BY_TRITON)), True

    def any_tensor(self):
        name = self.rng.choice(["text_input", "input_ids", "max_tokens", "stop_words", "messages", "n", "seed", "x"])
        return self._asked({name: self.array()}), False

    def torn(self):
        """Bytes, shapes and types that do not belong together."""
        made = self._asked({"n": 1})
        at = self.rng.randrange(len(made.inputs))
        how = self.rng.randrange(5)
        if how == 0:
            made.raw_input_contents[at] = self.tear(made.raw_input_contents[at])
        elif how == 1:
            del made.inputs[at].shape[:]
            made.inputs[at].shape.extend(self.rng.choices([-1, 0, 1, 2, 2**40, 2**62], k=self.rng.randrange(4)))
        elif how == 2:
            made.inputs[at].datatype = self.rng.choice(["", "BYTES", "INT8", "FP64", "BF16", "NOTHING", "x" * 500])
        elif how == 3:
            del made.raw_input_contents[at]
        else:
            made.inputs.add(name=self.rng.choice(["text_input", "n", ""]), datatype="BYTES", shape=[1, 1])
        return made, False

    def embed(self):
        """For a task of one answer."""
        given = {"text": np.array([[self.tear(b"some words to embed")]], object)}
        name = self.rng.choice(["text", "prompt", "pooling", "dimensions", "normalize", "truncate", "x"])
        if name in ("text", "prompt", "pooling"):
            words = [b"", b"\xff", b"\0", b"mean", b"w " * 2000, b"\xed\xa0\x80", b"[MASK]" * 600]
            given[name] = np.array([[self.rng.choice(words)]], object)
        elif name == "dimensions":
            given[name] = np.array([[self.rng.choice([-(2**31), -1, 0, 1, 2**31 - 1])]], np.int32)
        else:
            given[name] = self.array()
        return request("hostile_embed", **given)

    def body(self):
        """An HTTP body for `generate`."""
        name, value = self.rng.choice([*GOOD, "text_input", "messages", "bogus"]), self.rng.choice(VALUES)
        text = json.dumps({"text_input": "a", **FEW, name: value}).encode()
        return self.tear(text) if self.rng.random() < 0.5 else text

    def array(self):
        shape = self.rng.choice([(), (0,), (1,), (1, 1), (1, 3), (2, 1), (1, 0), (1, 1, 1), (70, 1)])
        kind = self.rng.choice(TENSORS)
        fill = self.rng.choice([b"", b"a", b"\xff"]) if kind == "O" else self.rng.choice([0, 1, 77])
        return np.full(shape, fill, kind)

    def tear(self, text):
        """Bytes that were changed, lost, doubled or put in."""
        found = bytearray(text)
        for _ in range(self.rng.randrange(1, 4)):
            at, length = self.rng.randrange(len(found) + 1), self.rng.randrange(1, 9)
            new = [b"", self.rng.randbytes(length), found[at : at + length] * 2, b'"', b"{", b"\\ud800", b"1e999"]
            found[at : at + self.rng.randrange(length)] = self.rng.choice(new)
        return bytes(found)

    def _asked(self, given):
        own = {} if {"text_input", "input_ids", "messages"} & given.keys() else {"text_input": "a"}
        return request("tiny", **own, **({} if "max_tokens" in given else FEW), **given)


def fault(code, message):
    """Empty for a fair refusal (the caller's fault, too much to do, no time left), else what it is."""
    found = errors.failure(code, message)
    if TRITONS_OWN.search(message) and "ServingError" not in message:
        return ""
    fair = type(found).__name__ in KNOWN and len(message) < 3000 and "Traceback" not in message
    return "" if fair else f"{type(found).__name__} {code}: {message[:300]}"


def stream(served, asked):
    """What was wrong with the replies to requests on one stream: each must end once."""
    messages = list(served.ask(*(made for made, _ in asked), timeout=120))
    failed = [message.error_message for message in messages if message.error_message]
    ended = [
        message for message in messages
        if message.error_message or message.infer_response.parameters["triton_final_response"].bool_param
    ]  # fmt: skip
    wrong = [found for message in failed if (found := fault("INTERNAL", message))]
    if len(ended) != len(asked):
        wrong.append(f"{len(ended)} ends of {len(asked)} requests")
    if len(failed) < sum(bad for _, bad in asked):
        wrong.append(f"{len(failed)} refused of {sum(bad for _, bad in asked)} that are bad")
    return wrong


def single(served, made):
    """What was wrong with the reply to a request of its own."""
    try:
        served.stub.ModelInfer(made, timeout=60)
    except grpc.RpcError as error:
        return [found] if (found := fault(error.code().name, error.details())) else []
    return []


def posts(served, bodies):
    """What was wrong with the replies to HTTP bodies, on one connection."""
    connection, wrong = http.client.HTTPConnection("127.0.0.1", served.http, timeout=60), []
    for body in bodies:
        connection.request("POST", "/v2/models/tiny/generate", body)
        with connection.getresponse() as answer:
            text = answer.read().decode(errors="replace")
        own = answer.status == 500 and TRITONS_OWN.search(text)
        if "ServingError" in text or not (own or answer.status in (200, 400)):
            wrong.append(f"{answer.status}: {text[:300]} for {body[:200]!r}")
    connection.close()
    return wrong


def rounds(served, seed, count):
    """So many requests, one in five as HTTP and one in five to the embedder; what was wrong with the replies."""
    hostile, wrong = Hostile(seed), []
    for _ in range(0, count, TOGETHER):
        part = TOGETHER // 5
        wrong += stream(served, [hostile.generate() for _ in range(TOGETHER - 2 * part)])
        wrong += posts(served, [hostile.body() for _ in range(part)])
        wrong += [found for _ in range(part) for found in single(served, hostile.embed())]
    return wrong


def logged(served):
    return "".join(path.read_text(errors="replace") for path in served.run.glob("*.log"))


@pytest.fixture(scope="module")
def embedder(served, tmp_path_factory):
    folder = tiny_encoders.write(tmp_path_factory.mktemp("bert"), "bert", "AutoModel")
    with guest(served, "embed", "hostile_embed", folder) as name:
        yield name


def alive(served, name):
    stub, ranks = eventually(lambda: served.family(name))
    return stub.pid, sorted(rank.pid for rank in ranks), counter(served, "tritonspeed_restarts_total", name)


def test_thousands_of_hostile_requests(served, embedder):
    """The same processes serve the same texts and vectors afterwards, and nothing unexpected is in the log."""
    good = request("tiny", "the quick", max_tokens=20, temperature=0.0)
    (before,) = answers(served.ask(good))
    with served.of("embed", embedder) as pipe:
        vector = pipe("the quick").tolist()
    lived = [alive(served, name) for name in ("tiny", embedder)]
    said = len(logged(served))
    with ThreadPoolExecutor(LINES) as threads:
        asking = [threads.submit(rounds, served, f"{SEED} {line}", MANY // LINES) for line in range(LINES)]
        wrong = Counter(found for each in asking for found in each.result())
    assert not wrong, "\n".join(f"{count} x {found}" for found, count in wrong.most_common(60))
    assert served.stub.ModelReady(service_pb2.ModelReadyRequest(name="tiny")).ready
    (after,) = answers(served.ask(good))
    assert after["text_output"].item() == before["text_output"].item()
    with served.of("embed", embedder) as pipe:
        assert pipe("the quick").tolist() == pytest.approx(vector, abs=1e-5)
    assert [alive(served, name) for name in ("tiny", embedder)] == lived
    assert "unexpected failure" not in logged(served)[said:]
