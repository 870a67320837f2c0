"""Values at their limits and beyond, names and sources, a model's defaults; and whatever else a caller may send."""

from __future__ import annotations

import json
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from backend.config import EngineConfig
from backend.errors import InvalidInput, LoadError
from backend.generation.parameter import NAMED, PARAMETERS
from backend.generation.params import LATER, Defaults, Limits, Options, decode_text, parse
from backend.generation.sequence import SamplingParams

LIMITS = Limits(default_max_tokens=256, max_samples=64, max_stop_strings=16, vocab_size=1000)
PLAIN = Defaults()
EOS = Defaults(eos_ids=frozenset({2, 3}))


def options(_text: str | None = None, _parameters: Any = None, _defaults: Defaults = PLAIN, **inputs: Any) -> Options:
    return parse(_parameters or {}, _text, inputs, _defaults, LIMITS)


def params(**given: Any) -> SamplingParams:
    return options(**given).params


def keys(**given: Any) -> SamplingParams:
    """As keys of sampling_parameters."""
    return options(json.dumps(given)).params


# --- defaults


def test_nothing_given() -> None:
    found = options()
    assert found == Options(SamplingParams(seed=found.params.seed))


def test_each_request_without_a_seed_gets_its_own() -> None:
    seeds = {params().seed for _ in range(20)}
    assert len(seeds) == 20 and all(0 <= seed < 2**64 for seed in seeds)


def folder(path: Path, **files: Any) -> Path:
    for name, content in files.items():
        (path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_the_models_own_defaults_but_not_do_sample(tmp_path: Path) -> None:
    given_ = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05}
    made = Defaults.from_folder(
        folder(tmp_path, generation_config={**given_, "do_sample": False, "eos_token_id": [7, 8], "max_length": 20})
    )
    assert made == Defaults(0.6, 0.9, 20, 0.1, 1.05, frozenset({7, 8}))
    found = options(_defaults=made)
    assert {name: getattr(found.params, name) for name in given_} == given_
    assert options(_defaults=made, temperature=0, top_k=-1).params.temperature == 0
    assert options(_defaults=made, top_k=-1).params.top_k == 0


def test_null_and_missing_files_are_the_general_defaults(tmp_path: Path) -> None:
    assert Defaults.from_folder(tmp_path) == Defaults()
    assert Defaults.from_folder(folder(tmp_path, generation_config={"temperature": None})) == Defaults()


def test_end_tokens_come_from_the_first_file_that_has_them(tmp_path: Path) -> None:
    made = Tokenizer(models.WordLevel({"a": 0, "</s>": 5}, unk_token="a"))
    made.save(str(folder(tmp_path, tokenizer_config={"eos_token": "</s>"}) / "tokenizer.json"))
    assert Defaults.from_folder(tmp_path).eos_ids == {5}
    folder(tmp_path, config={"text_config": {"eos_token_id": 9}})
    assert Defaults.from_folder(tmp_path).eos_ids == {9}
    folder(tmp_path, config={"eos_token_id": 2, "text_config": {"eos_token_id": 9}})
    assert Defaults.from_folder(tmp_path).eos_ids == {2}
    folder(tmp_path, generation_config={"eos_token_id": [3, 4]})
    assert Defaults.from_folder(tmp_path).eos_ids == {3, 4}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "not valid JSON"),
        ("[]", "JSON object"),
        ({"temperature": "hot"}, "generation_config.json: temperature must be a finite number"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, not 1.5"),
        ({"eos_token_id": "x"}, r"eos_token_id\[0\] must be an integer"),
    ],
)
def test_a_bad_generation_config_is_a_load_error(tmp_path: Path, content: Any, match: str) -> None:
    with pytest.raises(LoadError, match=match):
        Defaults.from_folder(folder(tmp_path, generation_config=content))


def test_smollm2_defaults(smollm2: Path) -> None:
    assert Defaults.from_folder(smollm2) == Defaults(eos_ids=frozenset({2}))


def test_limits_of_a_configuration() -> None:
    config = EngineConfig("m", default_max_tokens=9, max_prompts=8, max_stop_strings=3)
    assert Limits.of(config, 50) == Limits(9, 8, 3, 50)


# --- ranges

INT32 = 2**31 - 1
RANGES: list[tuple[str, list[Any], list[Any]]] = [
    ("max_tokens", [1, INT32, "5", 7.0, "7.0"],
     [0, -1, INT32 + 1, 1.5, "1.5", True, "", "x", nan, inf, [1], {}, "1_0"]),
    ("min_tokens", [0, 256], [-1, INT32 + 1, 0.5, False]),
    ("temperature", [0, 1e-9, 100, "0.5", "1e-1", ".5"],
     [-1e-9, 100.1, nan, inf, -inf, "nan", "inf", True, "1 2", 10**400]),
    ("top_p", [1e-9, 1], [0, -0.1, 1.0001, nan]),
    ("top_k", [-1, 0, 1, INT32, "20"], [-2, INT32 + 1, 2.5]),
    ("min_p", [0, 1], [-0.01, 1.01]),
    ("repetition_penalty", [0.0625, 1, 100], [0, 0.06, -1, 101, nan]),
    ("frequency_penalty", [-2, 2], [-2.01, 2.01, inf]),
    ("presence_penalty", [-2, 2], [-2.01, 2.01]),
    ("seed", [0, 2**64 - 1, str(2**64 - 1)], [-1, 2**64, 0.5, True, "0x1", "9" * 5000]),
    ("n", [1, 64], [0, 65, -1]),
    ("stop_token_ids", [[], [0], [999], 5, list(range(256))], [[-1], [1000], [1.5], ["x"], [0] * 257, [[1]], [None]]),
    ("stop", ["a", ["a", "b"], ["x" * 1024], [str(n) for n in range(16)]],
     ["", [""], ["x" * 1025], ["a"] * 17, 5, [5], [None], [["a"]], "\ud800", ["a"] * 10_000]),
    ("stream", [True, "true", "False"], [1, 0, "yes", "", [], 1.0]),
    ("ignore_eos", [True, "TRUE"], [1, "1"]),
    ("priority", [-5, 0, 5], [2**31, 0.5]),
    ("timeout", [0, 10**6], [-1, 2**64]),
    ("cache_salt", ["", "x" * 256, "é" * 128], ["x" * 257, "é" * 129, 5, "\ud800"]),
    ("max_length", [1, INT32], [0, INT32 + 1]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, good, _ in RANGES for value in good])
def test_values_within_their_range(name: str, value: Any) -> None:
    options(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, _, bad in RANGES for value in bad], ids=lambda value: ascii(value)[:30]
)
def test_values_beyond_their_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidInput) as error:
        options(**{name: value})
    message = str(error.value)
    assert NAMED[name].name in message or name in message
    assert len(message) < 300 and message.isprintable()


def test_errors_name_field_limit_and_value() -> None:
    for given_, message in [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1 and at most 2147483647, not 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, not 0.0"),
        ({"seed": 2**64}, f"seed must be at least 0 and at most {2**64 - 1}, not {2**64}"),
        ({"temperature": nan}, "temperature must be a finite number, not nan"),
        ({"n": 65}, "n is 65, the limit is 64 (max_prompts)"),
        ({"stop": ["a"] * 10_000}, "stop has 10000 values, the limit is 16 (max_stop_strings)"),
        ({"stop": ["ab" * 600]}, "stop_words[0] has 1200 characters, the limit is 1024"),
        ({"stream": "a\nb"}, r"stream must be true or false, not 'a\nb'"),
        ({"tempreature": 1}, "unknown parameter 'tempreature'; known: stream, max_tokens"),
    ]:
        with pytest.raises(InvalidInput) as error:
            options(**given_)
        assert str(error.value).startswith(message)


def test_tensors_are_numpy_values_and_bytes() -> None:
    found = options(
        max_tokens=np.int32(5), temperature=np.float32(0.5), seed=np.uint64(2**63), stream=np.bool_(True),
        stop_words=["天".encode(), b"", b"b"], stop_token_ids=[1, 2],
    )  # fmt: skip
    assert found.params == SamplingParams(
        max_tokens=5, temperature=0.5, seed=2**63, stop=("天", "b"), stop_token_ids=frozenset({1, 2})
    )
    assert found.stream
    with pytest.raises(InvalidInput, match=r"stop_words\[0\] must be a string of valid Unicode"):
        options(stop_words=[b"\xff"])
    with pytest.raises(InvalidInput, match="max_tokens"):
        options(max_tokens=np.bool_(True))


# --- names and sources


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("max_new_tokens", 7, "max_tokens", 7),
        ("min_new_tokens", 7, "min_tokens", 7),
        ("min_length", 7, "min_tokens", 7),
        ("random_seed", 7, "seed", 7),
        ("stop_words", ["a", "b", "a"], "stop", ("a", "b")),
        ("stop", "a", "stop", ("a",)),
        ("do_sample", False, "temperature", 0.0),
        ("do_sample", True, "temperature", 1.0),
        ("return_logprobs", True, "logprobs", True),
        ("return_cumulative_logprob", True, "logprobs", True),
    ],
)
def test_names_of_other_servers(name: str, value: Any, field: str, expected: Any) -> None:
    assert getattr(params(**{name: value}), field) == expected
    assert getattr(keys(**{name: value}), field) == expected
    assert getattr(options(_parameters={name: value}).params, field) == expected


def test_tensors_go_before_json_before_parameters() -> None:
    weakest = {"temperature": 0.1, "top_p": 0.1, "max_new_tokens": 1}
    found = options('{"top_p": 0.2, "max_tokens": 2}', weakest, max_tokens=3).params
    assert (found.temperature, found.top_p, found.max_tokens) == (0.1, 0.2, 3)


def test_two_names_of_one_thing_must_agree() -> None:
    assert keys(max_tokens=5, max_new_tokens=5).max_tokens == 5
    with pytest.raises(InvalidInput, match="max_new_tokens is given with another value as max_tokens"):
        keys(max_tokens=5, max_new_tokens=6)


def test_what_tritons_protocol_adds_is_passed_over() -> None:
    options(_parameters={"triton_enable_empty_final_response": True, "sequence_id": 0, "binary_data_output": True})
    with pytest.raises(InvalidInput, match="sequence_id"):
        options(sequence_id=0)


def test_null_is_not_given() -> None:
    assert keys(max_tokens=None, stop=None).max_tokens == 256


@pytest.mark.parametrize("name", sorted(LATER))
def test_what_comes_later_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match=f"{name} is not supported yet"):
        keys(**{name: {"type": "object"}})


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object, not a list"),
        ("5", "must be a JSON object, not 5"),
        ('"a"', "must be a JSON object"),
        ("[" * 10_000, "nested too deeply"),
        ('{"a":' * 10_000, "nested too deeply"),
        ('{"top_p": 1, "top_p": 1}', "'top_p' stands twice"),
        ('{"temperature": NaN}', "temperature must be a finite number, not nan"),
        ('{"temperature": 1e999}', "temperature must be a finite number"),
        ('{"max_tokens": ' + "9" * 5000 + "}", "not valid JSON"),
        ('{"max_tokens": {"a": 1}}', "max_tokens must be an integer, not a JSON object"),
        ('{"stop": ["\\ud800"]}', "stop"),
        ('{"\\ud800": 1}', "unknown parameter"),
        (b"\xff{}", "not valid JSON"),
        (" " * (1 << 20) + "{}", "1048578 bytes, the limit is 1048576"),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_bad_json(text: Any, match: str) -> None:
    with pytest.raises(InvalidInput, match=match):
        options(text)


def test_empty_json_is_nothing() -> None:
    assert options("").params.max_tokens == 256 == options("{}").params.max_tokens


# --- together


def test_end_tokens_unless_they_are_ignored() -> None:
    assert options(_defaults=EOS).params.stop_token_ids == {2, 3}
    assert options(_defaults=EOS, stop_token_ids=[9]).params.stop_token_ids == {2, 3, 9}
    assert options(_defaults=EOS, ignore_eos=True, stop_token_ids=[9]).params.stop_token_ids == {9}
    assert options(_defaults=EOS, ignore_eos=True, stop=["x"]).params.stop == ("x",)


def test_the_prompt_is_left_out_of_streams() -> None:
    assert not options().exclude_input
    assert options(stream=True).exclude_input
    assert options(exclude_input_in_output=True).exclude_input
    assert options(return_full_text=False).exclude_input
    for contrary in ({"exclude_input_in_output": False}, {"return_full_text": True}):
        assert not options(**contrary).exclude_input
        with pytest.raises(InvalidInput, match="exclude_input_in_output must be true"):
            options(stream=True, **contrary)
    with pytest.raises(InvalidInput, match="contradicts"):
        options(return_full_text=True, exclude_input_in_output=True)


def test_min_tokens_must_fit() -> None:
    assert params(min_tokens=256).min_tokens == 256
    with pytest.raises(InvalidInput, match="min_tokens is 257, more than max_tokens 256"):
        params(min_tokens=257)


def test_max_length_counts_the_prompt() -> None:
    assert options(max_length=500).params_for(100).max_tokens == 400
    assert options(max_length=500, max_tokens=10).params_for(100).max_tokens == 10
    assert options(max_length=101).params_for(100).max_tokens == 1
    assert options(max_tokens=10).params_for(10**6).max_tokens == 10
    with pytest.raises(InvalidInput, match="max_length 100 leaves no room after 100 prompt tokens"):
        options(max_length=100).params_for(100)
    with pytest.raises(InvalidInput, match="min_tokens 5 is more than max_length allows"):
        options(max_length=104, min_tokens=5).params_for(100)


def test_what_concerns_the_request() -> None:
    flags = ["finish_reason", "num_input_tokens", "num_output_tokens", "cumulative_logprob", "logprobs"]
    for flag in flags:
        found = options(**{f"return_{flag}": True})
        assert [name for name in flags if getattr(found, f"return_{name}")] == [flag]
    found = options(n=3, priority=-1, timeout=1_500_000, cache_salt="tenant")
    assert (found.n, found.priority, found.timeout, found.cache_salt) == (3, -1, 1.5, "tenant")
    assert options(timeout=0).timeout == inf


# --- the table


def test_names_are_unique() -> None:
    names = [name for each in PARAMETERS for name in (each.name, *each.aliases)]
    assert len(names) == len(set(names)) == len(NAMED)
    assert all(set(each.inputs) <= {each.name, *each.aliases} for each in PARAMETERS)


def test_the_table_and_the_model_configuration_name_the_same_inputs() -> None:
    text = (Path(__file__).parents[3] / "model_repository/generate/config.pbtxt").read_text()
    section = text[text.index("input [") : text.index("output [")]
    types = {"BYTES": "STRING"}
    for each in PARAMETERS:
        for name in each.inputs:
            dims = "-1" if each.many else "1"
            assert f'name: "{name}" data_type: TYPE_{types.get(each.type, each.type)} dims: [ {dims} ]' in section
    declared = {line.split('"')[1] for line in section.splitlines() if "name:" in line}
    prompts = {"text_input", "input_ids", "messages", "sampling_parameters"}
    assert declared - prompts == {name for each in PARAMETERS for name in each.inputs}


# --- whatever comes

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from([*NAMED, *LATER]) | st.text()
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=400)
@given(st.dictionaries(names, anything, max_size=4), st.dictionaries(names, anything, max_size=4))
def test_any_values_parse_or_are_invalid_input(parameters: dict[str, Any], inputs: dict[str, Any]) -> None:
    check(parameters, None, inputs)


@settings(deadline=None, max_examples=400)
@given(st.dictionaries(names, json_values, max_size=4).map(json.dumps) | st.text() | st.binary())
def test_any_json_parses_or_is_invalid_input(text: str | bytes) -> None:
    check({}, text, {})


def check(parameters: dict[str, Any], text: str | bytes | None, inputs: dict[str, Any]) -> None:
    try:
        found = parse(parameters, text, inputs, EOS, LIMITS)
    except InvalidInput as error:
        assert 0 < len(error.wire().encode()) < 1000  # noqa: PT017
    else:
        sampling = found.params
        assert 1 <= sampling.max_tokens <= INT32 and 0 <= sampling.min_tokens <= sampling.max_tokens
        assert 0 <= sampling.temperature <= 100 and 0 < sampling.top_p <= 1 and 0 <= sampling.min_p <= 1
        assert 0 <= sampling.seed < 2**64 and 0 <= sampling.top_k <= INT32
        assert all(sampling.stop) and all(0 <= token_id < 1000 for token_id in sampling.stop_token_ids)


# --- text


@pytest.mark.parametrize("text", ["a", " ", "\n", "天地 👍", "\ufffd", "\x01"])
def test_text_is_taken_as_it_is(text: str) -> None:
    assert decode_text(text.encode()) == text


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "text_input is empty"),
        (b"ab\xff", r"not valid UTF-8: byte 2 \(0xff\)"),
        (b"\xe5\xa4", "not valid UTF-8: byte 0"),
        ("\ud800".encode("utf-8", "surrogatepass"), "not valid UTF-8"),
        ("é\0".encode(), r'has "\\0" at character 1'),
        (b"\xc0\x80", "not valid UTF-8"),
    ],
)
def test_text_that_is_refused(data: bytes, match: str) -> None:
    with pytest.raises(InvalidInput, match=match):
        decode_text(data)


@settings(deadline=None)
@given(st.binary())
def test_any_bytes_are_text_or_invalid_input(data: bytes) -> None:
    try:
        assert decode_text(data).encode() == data
    except InvalidInput:
        assert not data or b"\0" in data or b"\xef\xbf\xbd" in data.decode(errors="replace").encode()


# --- headers that the server forwards


@pytest.mark.parametrize("name", ["traceparent", "tracestate", "X-Request-Id", "TraceParent"])
def test_headers_are_no_parameters_of_generation(name: str) -> None:
    assert options(_parameters={name: "anything"}).params.max_tokens == LIMITS.default_max_tokens
    with pytest.raises(InvalidInput, match="unknown parameter"):
        options(json.dumps({name: "anything"}))
