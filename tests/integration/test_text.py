"""The same text whichever way it is asked for: client, asyncio, command line, curl; whole or in pieces."""

import asyncio
import json
import subprocess
import sys
from contextlib import aclosing
from pathlib import Path

import pytest
from serving import events

pytestmark = pytest.mark.server

PARIS = "The capital of France is"
PROMPTS = [PARIS, "I love 🍕 and 🎉 and 👩‍👩‍👧 because", "中国的首都是", "def f(x):\n    return", "  two  spaces "]
GREEDY = {"max_tokens": 12, "temperature": 0.0}
SEEDED = {"max_tokens": 12, "temperature": 0.9, "top_p": 0.95, "seed": 7}


@pytest.fixture(scope="module")
def pipe(served):
    with served.pipeline("smollm2") as pipe:
        yield pipe


@pytest.fixture(scope="module")
def whole(pipe):
    """Text by prompt, greedy and seeded, as the blocking client gets it at once."""
    kinds = {"greedy": GREEDY, "seeded": SEEDED}
    return {kind: [one.text for one in pipe(PROMPTS, **how)] for kind, how in kinds.items()}


def test_known_answers(pipe, whole):
    assert whole["greedy"][0].startswith(" Paris")
    chat = pipe([{"role": "user", "content": "What is the capital of France?"}], max_tokens=20, temperature=0.0)
    assert (chat.text, chat.finish_reason) == ("The capital of France is Paris.", "stop")
    assert chat.num_output_tokens == 8 and chat.num_input_tokens > 30


@pytest.mark.parametrize(("kind", "how"), [("greedy", GREEDY), ("seeded", SEEDED)])
def test_streamed_pieces_make_the_whole(pipe, whole, kind, how):
    for prompt, text in zip(PROMPTS, whole[kind], strict=True):
        pieces = list(pipe.stream(prompt, **how))
        assert "".join(pieces) == text
        assert [piece.finish_reason for piece in pieces] == [""] * (len(pieces) - 1) + ["length"]
        assert sum(piece.num_output_tokens for piece in pieces) == 12
        assert len(pieces) > 3 and not any("\ufffd" in piece for piece in pieces if "\ufffd" not in text)


def test_asyncio(served, whole):
    async def ask():
        async with served.async_pipeline("smollm2") as pipe:
            all_at_once = await pipe(PROMPTS, **GREEDY)
            async with aclosing(pipe.stream(PROMPTS[1], **SEEDED)) as pieces:
                return [one.text for one in all_at_once], "".join([piece async for piece in pieces])

    assert asyncio.run(ask()) == (whole["greedy"], whole["seeded"][1])


def tritonspeed(served, *words, **more):
    program = Path(sys.executable).parent / "tritonspeed"
    line = [program, words[0], f"--port={served.port}", *words[1:]]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, **more)


def test_command_line(served, whole):
    flags = ["generate", "--name=smollm2", "--max-tokens=12", "--temperature=0"]
    done = tritonspeed(served, *flags, input=PROMPTS[1])
    assert (done.returncode, done.stdout, done.stderr) == (0, whole["greedy"][1] + "\n", "")
    done = tritonspeed(served, *flags, "--json", "--n=2", PROMPTS[2])
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["text"] for one in found] == [whole["greedy"][2]] * 2
    assert [one["index"] for one in found] == [0, 1]
    done = tritonspeed(served, *flags, "--top-p=7", PARIS)
    assert done.returncode == 1 and done.stderr.startswith("error: top_p must be") and done.stderr.count("\n") == 1


def curl(served, path, body):
    """Status, type and text of the answer."""
    show = "\n%{http_code} %{content_type}"
    url = f"http://127.0.0.1:{served.http}/v2/models/{path}"
    line = ["curl", "-sN", "--max-time", "60", "-w", show, url, "-d", json.dumps(body, ensure_ascii=False)]
    text, _, last = subprocess.run(line, capture_output=True, check=True).stdout.decode().rpartition("\n")
    return *last.split(" ", 1), text


def test_curl(served, whole):
    for prompt, text in zip(PROMPTS, whole["greedy"], strict=True):
        status, _, body = curl(served, "smollm2/generate", {"text_input": prompt, **GREEDY})
        assert (status, json.loads(body)["text_output"]) == ("200", prompt + text)  # the default is with the prompt
    body = {"text_input": PROMPTS[1], "stream": True, **SEEDED}
    status, kind, stream = curl(served, "smollm2/generate_stream", body)
    assert (status, kind.partition(";")[0]) == ("200", "text/event-stream")
    assert "".join(event["text_output"] for event in events(stream)) == whole["seeded"][1]


def test_curl_without_stream_on_generate_stream(served, whole):
    _, _, stream = curl(served, "smollm2/generate_stream", {"text_input": PARIS, **GREEDY})
    assert [event["text_output"] for event in events(stream)] == [PARIS + whole["greedy"][0]]


@pytest.mark.parametrize(
    "names",
    [
        {"max_new_tokens": 12, "do_sample": False, "return_full_text": False, "min_new_tokens": 2},
        {"max_new_tokens": "12", "do_sample": "false", "return_full_text": "false"},
        {"max_length": 5 + 12, "do_sample": False, "exclude_input_in_output": True},
        {"parameters": {"max_tokens": 12, "temperature": 0}, "exclude_input_in_output": True},
        {"sampling_parameters": '{"max_tokens": "12", "temperature": "0.0", "top_p": "1"}', "return_full_text": False},
        {"sampling_parameters": '{"max_tokens": 12, "temperature": 0}', "max_new_tokens": 5, "return_full_text": False},
    ],
)
def test_other_names_over_http(served, whole, names):
    """DeepSpeed-MII's, numbers as strings, nested parameters; the JSON wins over the parameters."""
    status, body = served.post("smollm2/generate", {"text_input": PARIS, **names})
    assert (status, json.loads(body).get("text_output")) == (200, whole["greedy"][0]), body


def test_stop_strings_end_the_text_and_never_leak(pipe, whole):
    text = whole["greedy"][0]
    for stop in (text[3:6], text[-9:-6], text[8:16]):
        kept = text[: text.index(stop)]
        once = pipe(PARIS, stop=[stop, "never there"], **GREEDY)
        pieces = list(pipe.stream(PARIS, stop=stop, **GREEDY))
        assert (once.text, once.finish_reason) == (kept, "stop")
        assert ("".join(pieces), pieces[-1].finish_reason) == (kept, "stop")


def test_stop_tokens_and_ignore_eos(pipe):
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    assert pipe(chat, max_tokens=30, temperature=0.0).finish_reason == "stop"
    longer = pipe(chat, max_tokens=30, temperature=0.0, ignore_eos=True)
    assert (longer.finish_reason, longer.num_output_tokens) == ("length", 30)
    first = pipe(PARIS, max_tokens=1, temperature=0.0, return_logprobs=True).logprobs[0]["token_id"]
    stopped = pipe(PARIS, stop_token_ids=[first], **GREEDY)
    assert (stopped.text, stopped.finish_reason, stopped.num_output_tokens) == ("", "stop", 1)
