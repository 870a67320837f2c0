"""What a caller does wrong gets InvalidInput that names the field, alone; nothing beside it changes."""

import json

import numpy as np
import pytest
from serving import answers, failure, finals, request

from client import InvalidInput, Unavailable

pytestmark = pytest.mark.server

NAN, INF = float("nan"), float("inf")

BAD = [
    ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", -(2**31)), ("min_tokens", -1), ("min_length", -1),
    ("temperature", -0.1), ("temperature", NAN), ("temperature", INF), ("temperature", -INF), ("temperature", 1e30),
    ("top_p", 0.0), ("top_p", 1.5), ("top_p", -1.0), ("top_p", NAN), ("top_k", -2), ("top_k", -(2**31)),
    ("min_p", -0.1), ("min_p", 1.1), ("min_p", NAN), ("repetition_penalty", 0.0), ("repetition_penalty", -1.0),
    ("repetition_penalty", INF), ("frequency_penalty", 2.1), ("frequency_penalty", NAN), ("presence_penalty", -2.1),
    ("presence_penalty", INF), ("n", 0), ("n", -3), ("n", 65), ("n", 2**31 - 1), ("stop_words", ["a"] * 17),
    ("stop_words", [b"\xff"]), ("stop_words", ["x" * 1025]), ("stop_token_ids", [-1]), ("stop_token_ids", [10**6]),
    ("stop_token_ids", [1] * 257),
]  # fmt: skip
"""An input and a value out of its range."""

BAD_JSON = [
    "nothing", "[]", "3", "null", '"text"', "{", '{"max_tokens": 1,}', '{"a": 1, "a": 2}', "[" * 10_000, "{" * 10_000,
    '{"x": ' * 5_000 + "1" + "}" * 5_000, '{"temperature": NaN}', '{"temperature": Infinity}', '{"temperature": "nan"}',
    '{"temperature": 1e999}', '{"temperature": true}', '{"max_tokens": 1.5}', '{"max_tokens": "many"}',
    '{"max_tokens": 2147483648}', '{"max_tokens": 1e300}', '{"max_tokens": [1]}', '{"seed": -1}',
    '{"seed": 18446744073709551616}', '{"stream": 1}', '{"stop": 5}', '{"stop": [""]}', '{"stop": [["a"]]}',
    '{"stop": "\\ud800"}', '{"cache_salt": 5}', '{"priority": "high"}', '{"timeout": -1}', '{"bogus": 1}',
    '{"guided_decoding_guide_type": "json"}', '{"structured_outputs": {}}', '{"max_length": 1}', '{"min_tokens": 300}',
    '{"return_full_text": true, "exclude_input_in_output": true}', '{"max_tokens": 3, "max_new_tokens": 4}',
    b'{"stop": "\xff"}', '{"' + "k" * 100_000 + '": 1}',
]  # fmt: skip
"""For sampling_parameters."""

BAD_PROMPTS = [
    {"text_input": b""}, {"text_input": b"\0"}, {"text_input": b"a\0b"}, {"text_input": b"\xff\xfe"},
    {"text_input": b"\xed\xa0\x80"}, {"text_input": b"\xf0\x9f\x98"}, {"text_input": "a", "input_ids": [5]},
    {"text_input": "a", "messages": "[]"}, {"input_ids": [-1]}, {"input_ids": [300]}, {"input_ids": [2**31 - 1]},
    {"messages": "nothing"}, {"messages": "[]"}, {"messages": "{}"}, {"messages": '[{"role": 1}]'},
    {"messages": "[" * 10_000}, {"max_tokens": 3}, {"text_input": "x" * (2**20 + 1)},
    {"text_input": "a", "stream": True, "exclude_input_in_output": False},
]  # fmt: skip


def refusal(served, *given, model="tiny", **tensors):
    """The message of a request that must be refused: the class, the field, one line."""
    message = failure(served.ask(request(model, *given, **tensors)))
    assert message.startswith("InvalidInput: ") and len(message) < 1000
    assert "Traceback" not in message and "\n" not in message
    return message


@pytest.mark.parametrize(("name", "value"), BAD)
def test_values_out_of_range(served, name, value):
    assert name.replace("min_length", "min_") in refusal(served, "a", **{name: value})


@pytest.mark.parametrize("text", BAD_JSON, ids=lambda text: ascii(text)[:30])
def test_sampling_parameters(served, text):
    refusal(served, "a", sampling_parameters=text)


@pytest.mark.parametrize("given", BAD_PROMPTS, ids=lambda given: ascii(given)[:40])
def test_prompts(served, given):
    refusal(served, **given)


@pytest.mark.parametrize(
    "parameters",
    [{"bogus": 1}, {"max_tokens": 0}, {"temperature": NAN}, {"temperature": "warm"}, {"stop": "a\ud7ff" * 600}],
)
def test_request_parameters(served, parameters):
    assert next(iter(parameters)) in refusal(served, "a", parameters)


def test_unknown_keys_are_named_whatever_is_in_them(served):
    name = 'evil\n"name"\x1b[31m' + "x" * 200
    message = refusal(served, "a", sampling_parameters=json.dumps({name: 1}))
    assert "evil\\n" in message and "\x1b" not in message


def test_limits_name_themselves_and_the_actual_value(served):
    assert "512 tokens, the limit is 511" in refusal(served, input_ids=[5] * 512)
    assert f"{2**20 + 5} bytes, the limit is {2**20} (max_prompt_bytes)" in refusal(served, "x" * (2**20 + 5))
    assert "n is 70, the limit is 64 (max_prompts)" in refusal(served, "a", n=70)
    three = {"text_input": np.array([[b"a"]] * 3, object), "n": np.full((3, 1), 22, np.int32)}
    assert "66 sequences (prompts x n), the limit is 64 (max_prompts)" in refusal(served, **three)


def test_exactly_at_a_limit(served):
    """One token is all that is left after a prompt of 511."""
    (answer,) = answers(served.ask(request("tiny", input_ids=[5] * 511, max_tokens=9, return_num_output_tokens=True)))
    assert answer["num_output_tokens"].item() == 1
    (answer,) = answers(served.ask(request("tiny", "a", n=64, max_tokens=1, stop_words=["never"] * 16)))
    assert answer["index"].shape == (64, 1)


REFUSED_BY_TRITON = [
    {"text_input": np.array([b"a"], object)},
    {"text_input": np.array([[b"a", b"b"]], object)},
    {"text_input": "a", "max_tokens": np.array([[3], [3]], np.int32)},
    {"text_input": "a", "max_tokens": np.array([[3]], np.int64)},
    {"text_input": "a", "unheard_of": np.array([[3]], np.int32)},
    {"text_input": np.array([[b"a"]] * 65, object)},
]


@pytest.mark.parametrize("given", REFUSED_BY_TRITON)
def test_wrong_tensors_are_the_callers_fault_for_our_client_too(served, given):
    from client.limits import Limits

    with served.pipeline("tiny") as pipe, pytest.raises(InvalidInput):
        list(pipe.transport.infer(request("tiny", **given), Limits()))


def test_models_that_are_not_there(served):
    with served.pipeline("nothing") as pipe, pytest.raises(InvalidInput, match="tritonspeed list"):
        pipe("a")
    with served.pipeline("misspelt", retries=0) as pipe, pytest.raises(Unavailable):
        pipe("a")


def test_the_server_survives_what_our_client_is_refused(served):
    """With the metadata triton_grpc_error on its calls, 2.51 dies of less."""
    with served.pipeline("tiny") as pipe:
        for _ in range(600):
            with pytest.raises(InvalidInput):
                pipe("a", n=0)
            assert pipe("a", max_tokens=1).num_output_tokens == 1


@pytest.mark.parametrize("path", ["generate", "generate_stream"])
def test_http(served, path):
    """400 and the field's name; what is not JSON at all is refused by Triton, in its own way."""
    for body in (
        {"text_input": "a", "max_tokens": 0},
        {"text_input": "a", "bogus": 1},
        {"text_input": "", "max_tokens": 1},
        {"text_input": "a", "max_tokens": 3_000_000_000},
        {"text_input": "a", "temperature": -1},
        {"text_input": "a", "sampling_parameters": "{"},
        {"max_tokens": 3},
        b'{"text_input": "a", "temperature": NaN}',
        b'{"text_input": "\xff"}',
    ):
        status, text = served.post(f"tiny/{path}", body)
        assert status == 400 and "InvalidInput: " in text, (body, text)
    for body in (b"nothing", b'{"text_input": "\\ud800"}', b'{"text_input": "a", "temperature": 1e999}', b""):
        assert served.post(f"tiny/{path}", body)[0] >= 400
    assert served.post(f"nothing/{path}", {"text_input": "a"})[0] == 404


def test_good_ones_beside_bad_ones_stay_what_they_are(served):
    """Sixteen streams, alone and then among a hundred requests that are refused."""
    good = [request("tiny", f"prompt {i}", name=str(i), max_tokens=40, seed=i, stream=bool(i % 2)) for i in range(16)]
    bad = [request("tiny", "a", name="bad", **{name: value}) for name, value in BAD]
    bad += [request("tiny", "a", name="bad", sampling_parameters=text) for text in BAD_JSON]

    def texts(messages):
        found = dict.fromkeys(map(str, range(16)), b"")
        for message in messages:
            if message.infer_response.id != "bad" and message.infer_response.outputs:
                found[message.infer_response.id] += message.infer_response.raw_output_contents[0][4:]
        return found

    alone = texts(list(served.ask(*good)))
    mixed = list(served.ask(*bad[:20], *good, *bad[20:]))
    assert texts(mixed) == alone and all(alone.values())
    assert finals(mixed) == {"bad": len(bad)} | dict.fromkeys(alone, 1)
    assert sum(bool(message.error_message) for message in mixed) == len(bad)
