"""Requests: from values to prompts, and from deltas to outputs, without an engine."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from backend.config import EngineConfig
from backend.errors import InvalidInput
from backend.generation.params import Defaults
from backend.generation.request import Request
from backend.generation.stream import Delta
from backend.generation.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))
from tiny import save_tokenizer

ASKED = ("return_finish_reason", "return_num_output_tokens")
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, 300)
    (folder / "chat_template.jinja").write_text(CHAT)
    config = EngineConfig(model=str(folder), max_prompts=4, max_prompt_bytes=100)
    tokenizer = Tokenizer.from_folder(folder)
    return SimpleNamespace(config=config, tokenizer=tokenizer, defaults=Defaults(eos_ids=frozenset({2})), vocab=300)


def parse(engine, *rows, **parameters):
    return Request.parse(list(rows), parameters, engine)


def test_text_ids_and_messages_become_prompts(engine):
    request = parse(
        engine, {"text_input": b"the fox"}, {"input_ids": [5, 6]}, {"messages": b'[{"role":"user","content":"Hi"}]'}
    )
    assert request.texts == ["the fox", engine.tokenizer.decode([5, 6]), "<user>Hi"]
    assert [list(p.token_ids) for p in request.prompts][1] == [5, 6]
    assert engine.tokenizer.decode(request.prompts[2].token_ids) == "<user>Hi"


def test_ids_become_text_only_where_the_answer_repeats_them(engine):
    assert parse(engine, {"input_ids": [5, 6], "exclude_input_in_output": True}).texts == [""]
    assert parse(engine, {"input_ids": [5, 6]}).texts == [engine.tokenizer.decode([5, 6])]
    assert parse(engine, {"input_ids": [5, 299_999]}).texts == [engine.tokenizer.decode([5])]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "exactly one of text_input, input_ids, messages must be given, not none"),
        ({"text_input": b"a", "input_ids": [1]}, "not text_input and input_ids"),
        ({"text_input": b"a" * 101}, r"101 bytes, the limit is 100 \(max_prompt_bytes\)"),
        ({"text_input": b"\xff"}, "not valid UTF-8"),
        ({"messages": b"{"}, "messages is not a JSON list"),
        ({"messages": b'[{"role":"user","content":"\\ud800"}]'}, "messages hold half of a surrogate pair"),
        ({"messages": b'[{"role":"user","content":"a\\u0000"}]'}, "messages has"),
        ({"text_input": b"a", "n": 5}, r"n is 5, the limit is 4 \(max_prompts\)"),
    ],
)
def test_what_is_wrong_is_named(engine, row, message):
    with pytest.raises(InvalidInput, match=message):
        parse(engine, row)


def test_prompts_times_n_are_limited(engine):
    parse(engine, *[{"text_input": b"a", "n": 2}] * 2)
    with pytest.raises(InvalidInput, match=r"6 sequences \(prompts x n\), the limit is 4 \(max_prompts\)"):
        parse(engine, *[{"text_input": b"a", "n": 2}] * 3)


@pytest.mark.parametrize("name", ["stream", "exclude_input_in_output", "return_logprobs"])
def test_what_concerns_the_answer_must_be_the_same_for_all_prompts(engine, name):
    with pytest.raises(InvalidInput, match="must be the same for all prompts"):
        parse(engine, {"text_input": b"a", name: True}, {"text_input": b"b", name: False})


def test_a_plain_answer_waits_for_all_and_has_a_row_for_each(engine):
    request = parse(
        engine,
        {"text_input": b"the", "n": 2},
        {"text_input": b"fox"},
        return_finish_reason=True,
        return_num_output_tokens=True,
    )
    assert request.answer([Delta(0, " a", [5]), Delta(2, "!", [7], "stop")]) is None
    assert request.answer([Delta(0, "b", [6], "length")]) is None
    outputs = request.answer([Delta(1, "c", [8], "stop")])
    assert outputs["text_output"].tolist() == [[b"the ab"], [b"thec"], [b"fox!"]]
    assert outputs["index"].tolist() == [[0], [1], [2]] and outputs["index"].dtype == np.int32
    assert outputs["finish_reason"].tolist() == [[b"length"], [b"stop"], [b"stop"]]
    assert outputs["num_output_tokens"].tolist() == [[2], [1], [1]] and outputs["num_output_tokens"].dtype == np.uint32


def test_a_stream_answers_with_the_news_alone(engine):
    request = parse(
        engine, {"text_input": b"the", "stream": True, "return_logprobs": True, "return_num_input_tokens": True}
    )
    outputs = request.answer([Delta(0, " a", [5, 6], "", -3.0, [-1.0, -2.0])])
    assert outputs["text_output"].tolist() == [[b" a"]]
    assert outputs["num_input_tokens"].tolist() == [[len(request.prompts[0].token_ids)]]
    entries = json.loads(outputs["logprobs"][0, 0])
    assert [(e["token_id"], e["logprob"]) for e in entries] == [(5, -1.0), (6, -2.0)]
    assert all(set(e) == {"token_id", "token", "logprob"} for e in entries)
    assert "finish_reason" not in outputs
