"""Every limit, exactly at it and one past it; hostile images; ten thousand stop strings. docs/faults.md, 18 to 20."""

import json
import signal
import urllib.error
import urllib.request

import numpy as np
import pytest
import tiny_diffusion
from guests import guest
from serving import answers, failure, request

pytestmark = pytest.mark.server

TEXT = "the quick brown fox jumps over the lazy dog. the quick brown fox"
IDS = [5] * 48


@pytest.fixture(scope="module")
def strict(served, tiny):
    small = {"max_prompt_bytes": 60, "max_model_len": 48, "max_prompts": 4, "max_stop_strings": 3}
    with guest(served, "generate", "strict", tiny, **small) as name:
        yield name


def padded(size):
    """Sampling parameters of so many bytes."""
    return '{"top_k": 3}'.ljust(size)


LIMITS = {
    "prompt bytes": (
        {"text_input": TEXT[:60]},
        {"text_input": TEXT[:61]},
        "61 bytes, the limit is 60 (max_prompt_bytes)",
    ),
    "prompt tokens": ({"input_ids": IDS[:47]}, {"input_ids": IDS}, "48 tokens, the limit is 47"),
    "samples": ({"n": 4}, {"n": 5}, "n is 5, the limit is 4 (max_prompts)"),
    "stop strings": (
        {"stop_words": [*"QRS"]},
        {"stop_words": [*"QRST"]},
        "stop_words has 4 values, the limit is 3 (max_stop_strings)",
    ),
    "stop characters": (
        {"stop_words": ["Q" * 1024]},
        {"stop_words": ["Q" * 1025]},
        "1025 characters, the limit is 1024",
    ),
    "stop tokens": (
        {"stop_token_ids": [299] * 256},
        {"stop_token_ids": [299] * 257},
        "stop_token_ids has 257 values, the limit is 256",
    ),
    "a stop token": (
        {"stop_token_ids": [299]},
        {"stop_token_ids": [300]},
        "stop_token_ids has 300, the vocabulary 300",
    ),
    "temperature": ({"temperature": 100.0}, {"temperature": 101.0}, "at most 100"),
    "top_p": ({"top_p": 1.0}, {"top_p": 1.0001}, "at most 1"),
    "max_tokens": (
        {"max_tokens": 2**31 - 1},
        {"sampling_parameters": f'{{"max_tokens": {2**31}}}'},
        f"max_tokens must be at least 1 and at most {2**31 - 1}, not {2**31}",
    ),
    "parameters' bytes": (
        {"sampling_parameters": padded(2**20)},
        {"sampling_parameters": padded(2**20 + 1)},
        f"{2**20 + 1} bytes, the limit is {2**20}",
    ),
    "salt": (
        {"sampling_parameters": json.dumps({"cache_salt": "s" * 256})},
        {"sampling_parameters": json.dumps({"cache_salt": "s" * 257})},
        "cache_salt has 257 bytes, the limit is 256",
    ),
}
"""What is accepted, what is refused, and the refusal."""


@pytest.mark.parametrize("name", LIMITS)
def test_at_a_limit_and_one_past_it(served, strict, name):
    last, over, refusal = LIMITS[name]
    few = {"max_tokens": 2} if name not in ("max_tokens", "prompt tokens") else {}
    for given, expected in ((last, ""), (over, refusal)):
        asked = {**({} if {"text_input", "input_ids"} & given.keys() else {"text_input": "the"}), **few, **given}
        if expected:
            message = failure(served.ask(request(strict, **asked)))
            assert message.startswith("InvalidInput: ") and expected in message
        else:
            assert len(answers(served.ask(request(strict, **asked)))) == 1


def test_prompts_of_one_request(served, strict):
    four, five = (np.array([[b"the"]] * count, object) for count in (4, 5))
    (answer,) = answers(served.ask(request(strict, text_input=four)))
    assert answer["text_output"].shape == (4, 1)
    message = failure(served.ask(request(strict, text_input=five)))
    assert message.startswith("InvalidInput: ") and "5 sequences (prompts x n), the limit is 4 (max_prompts)" in message


def test_ten_thousand_stop_strings(served):
    many = [str(i) for i in range(10_000)]
    for given in ({"stop_words": many}, {"sampling_parameters": json.dumps({"stop": many})}):
        message = failure(served.ask(request("tiny", "a", **given)))
        assert message.startswith("InvalidInput: ") and "10000" in message and "the limit is 16" in message


# ---- images


@pytest.fixture(scope="module")
def images(served, tmp_path_factory):
    folder = tiny_diffusion.save("sd", tmp_path_factory.mktemp("sd"))
    small = {"max_pixels": 32 * 32, "max_steps": 3, "max_images": 2, "max_prompt_bytes": 20}
    with guest(served, "text_to_image", "images", folder, **small) as name:
        yield name


def draw(served, **given):
    """Status and answer over HTTP; NaN and infinity as Python writes them."""
    body = json.dumps({"prompt": "a", "num_inference_steps": 1, **given}).encode()
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{served.http}/v2/models/images/generate", body, 60) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


AT = [
    {"height": 32, "width": 32},
    {"num_inference_steps": 3},
    {"num_images_per_prompt": 2},
    {"prompt": "a" * 20},
    {"guidance_scale": 1000.0},
]
PAST = [
    ({"height": 40, "width": 32}, "1280 pixels, the limit is 1024 (max_pixels)"),
    ({"num_inference_steps": 4}, "at most 3 (max_steps)"),
    ({"num_inference_steps": 0}, "at least 1"),
    ({"num_inference_steps": 10**9}, "at most 3"),
    ({"num_images_per_prompt": 3}, "at most 2 (max_images)"),
    ({"num_images_per_prompt": 0}, "at least 1"),
    ({"prompt": "a" * 21}, "21 bytes, the limit is 20 (max_prompt_bytes)"),
    ({"guidance_scale": 1001.0}, "at most 1000"),
    ({"guidance_scale": float("nan")}, "guidance_scale"),
    ({"guidance_scale": float("inf")}, "guidance_scale"),
    ({"height": 33, "width": 32}, "multiple of 8"),
    ({"height": 0, "width": 0}, "at least 1"),
    ({"height": -8, "width": 32}, "at least 1"),
    ({"height": 2**31 - 8, "width": 2**31 - 8}, "the limit is 1024"),
    ({"height": 40}, "1280 pixels, the limit is 1024"),
]


def test_images_at_their_limits(served, images):
    for given in AT:
        status, text = draw(served, **given)
        assert status == 200, (given, text)


def test_images_past_their_limits_are_refused_before_a_rank_hears_of_them(served, images):
    """The rank is stopped meanwhile: it can have allocated nothing."""
    (rank,) = served.family(images)[1]
    rank.send_signal(signal.SIGSTOP)
    try:
        for given, refusal in PAST:
            status, text = draw(served, **given)
            assert status == 400 and "InvalidInput: " in text and refusal in text, (given, text)
    finally:
        rank.send_signal(signal.SIGCONT)
    assert draw(served)[0] == 200
