"""The question answerer's training: the facts it makes up, the spans it reads, what it leaves behind."""

import json
from itertools import islice

import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from backend.training import facts, qa


def some(n, seed=1, **options):
    return list(islice(facts.examples(seed, **options), n))


def test_the_answer_stands_where_the_example_says():
    for example in some(200, held_out=False):
        assert example.context[example.start :].startswith(example.answer)
        assert example.question.endswith("?") and "{" not in example.question + example.context


def test_what_is_unanswered_has_its_answer_nowhere():
    examples = some(200, held_out=False, unanswered=0.5)
    unanswered = [example for example in examples if example.start < 0]
    assert 70 < len(unanswered) < 130 and {example.answer for example in unanswered} == {""}
    assert all(example.context.endswith(".") for example in unanswered)


def test_one_seed_one_text():
    assert some(20, held_out=False) == some(20, held_out=False) != some(20, seed=2, held_out=False)


def test_what_is_held_out_has_other_words_and_other_people():
    last = {topic.asked[-1].split("{name}")[0] for topic in facts.TOPICS}
    seen, held_out = some(300, held_out=False), some(300, seed=2, held_out=True)
    assert {example.question for example in seen}.isdisjoint(example.question for example in held_out)
    assert all(any(example.question.startswith(words) for words in last) for example in held_out)
    for topic in facts.TOPICS:
        assert len(set(topic.asked)) == len(topic.asked) and all("{value}" in said for said in topic.said)


def test_the_span_found_is_the_likeliest_within_the_context(encoder):
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    example = facts.Example("who is ann?", "ann is old", "is old", 4)
    read = qa._read(tokenizer, [example])
    ((first, last),) = qa._ends(read, [example]).tolist()
    assert qa._ends(read, [facts.Example(example.question, example.context, "", -1)]).tolist() == [[0, 0]]
    logits = torch.zeros(read.input_ids.shape[1], 2)
    logits[first, 0] = logits[last, 1] = 5.0
    logits[1, 0] = logits[2, 1] = 9.0  # in the question: no answer
    assert qa._answer(read, 0, logits, example.context) == "is old"
    logits[0] = 5.5  # both ends at the first token: no answer
    assert qa._answer(read, 0, logits, example.context) == ""
    logits[0] = 0.0
    logits[last, 0] = logits[first, 1] = 7.0  # an end before its start is none
    assert qa._answer(read, 0, logits, example.context) != ""


def test_it_leaves_a_model_and_what_it_has_not_seen(encoder, tmp_path):
    metrics = qa.train(encoder, tmp_path, qa.Amount(trained=2 * qa.BATCH, held_out=5))
    assert metrics["trained_on"] == 2 * qa.BATCH and metrics["of"] == 5 and 0 <= metrics["exact_match"] <= 1
    AutoModelForQuestionAnswering.from_pretrained(tmp_path)
    rows = json.loads((tmp_path / "heldout.json").read_text())
    assert [facts.Example(**row) for row in rows] == some(5, seed=2, held_out=True)
    assert json.loads((tmp_path / "metrics.json").read_text()) == pytest.approx(metrics)
