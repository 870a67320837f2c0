"""QuestionAnswering against the plainest decoding of transformers' own model, tokenizer and overflowing windows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from backend import samples
from backend.config import EngineConfig
from backend.errors import InvalidInput
from backend.tasks.qa import Context, QuestionAnswering, Window, best
from backend.tasks.text import Texts

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

from serving_tasks import served
from tiny_encoders import write

AUTO = "AutoModelForQuestionAnswering"
FAMILIES = ["bert", "roberta", "distilbert"]
SHORT = "Anna Smith of Berlin loved São Paulo, isn't it? 東京 (film)."
LONG = " ".join(f"{SHORT} The lazy dog {number} writes naïvely about unwonderful rivers." for number in range(40))
QUESTION = "Who is the quick brown fox?"


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return write(tmp_path_factory.mktemp(request.param), request.param, AUTO)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write(tmp_path_factory.mktemp("bert"), "bert", AUTO)


def task_of(folder, **config):
    return QuestionAnswering(folder, EngineConfig(model=str(folder), step_tokens=256, **config))


def row(question=QUESTION, context=LONG, **options):
    return {"question": question.encode(), "context": context.encode(), **options}


def encoded(folder, question, context, max_seq_len=64, doc_stride=32):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer(
        question, context, truncation="only_second", max_length=max_seq_len, stride=doc_stride,
        return_overflowing_tokens=True, return_offsets_mapping=True, return_tensors="pt", padding=True,
    )  # fmt: skip


def model_of(folder):
    return getattr(transformers, AUTO).from_pretrained(folder).eval()


@torch.no_grad()
def truth(folder, question, context, top_k=1, longest=15, impossible=False, **windows):
    """What the question-answering pipeline of transformers 4 did, one step after the other."""
    found, nothing = [], 1.0
    read = encoded(folder, question, context, **windows)
    taken = {name: read[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in read}
    output = model_of(folder)(**taken)
    for at, window in enumerate(read.encodings):
        allowed = torch.tensor([part == 1 for part in window.sequence_ids])
        allowed[0] = True  # the model says there that there is no answer
        first, last = (
            logits[at].masked_fill(~allowed, -torch.inf).softmax(-1)
            for logits in (output.start_logits, output.end_logits)
        )
        nothing = min(nothing, float(first[0] * last[0]))
        spans = [
            (float(first[begin] * last[end]), begin, end)
            for begin in range(1, len(first))
            for end in range(begin, min(begin + longest, len(first)))
            if allowed[begin] and allowed[end]
        ]
        for score, begin, end in sorted(spans, reverse=True)[: 2 * top_k + 10]:
            start = window.word_to_chars(window.token_to_word(begin), 1)[0]
            stop = window.word_to_chars(window.token_to_word(end), 1)[1]
            text = context[start:stop]
            known = next((each for each in found if each[0].lower() == text.lower()), None)
            if known:
                known[1] += score
            else:
                found.append([text, score, start, stop])
    if impossible:
        found.append(["", nothing, 0, 0])
    return sorted(found, key=lambda each: -each[1])[:top_k]


@torch.no_grad()
def answered(task, model, rows):
    """The task's own way without ranks: all pieces in micro-batches, padded as a rank pads them."""
    items = [task.parse(each) for each in rows]
    prepared = task.prepare(items)
    pieces = [piece for own in prepared for piece in own]
    logits = [None] * len(pieces)
    for places in task.cut(pieces):
        batch = task.batch([pieces[place] for place in places])
        for place, answer in zip(places, forward(model, batch), strict=True):
            logits[place] = answer
    left = iter(logits)
    return [task.finish(item, own, [next(left) for _ in own]) for item, own in zip(items, prepared, strict=True)]


def forward(model, batch: Texts):
    mask = torch.from_numpy(np.arange(batch.lengths.max()) < batch.lengths[:, None])
    ids, types = torch.zeros(mask.shape, dtype=torch.long), torch.zeros(mask.shape, dtype=torch.long)
    ids[mask], types[mask] = torch.from_numpy(batch.input_ids).long(), torch.from_numpy(batch.type_ids).long()
    typed = {"token_type_ids": types} if model.config.model_type == "bert" else {}
    output = model(input_ids=ids, attention_mask=mask.long(), **typed)
    return list(QuestionAnswering.forward(output, batch, mask.long()).numpy())


def same(answers, expected):
    assert [(each.answer, each.start, each.end) for each in answers] == [(text, *at) for text, _, *at in expected]
    np.testing.assert_allclose([each.score for each in answers], [score for _, score, *_ in expected], rtol=2e-4)


@pytest.mark.parametrize(("max_seq_len", "doc_stride"), [(64, 32), (48, 7), (40, 0), (64, 1)])
def test_windows_are_those_of_transformers(folder, max_seq_len, doc_stride):
    task = task_of(folder)
    for context in (LONG, SHORT, LONG[:117]):
        item = task.parse(row(context=context, max_seq_len=max_seq_len, doc_stride=doc_stride))
        expected = encoded(folder, QUESTION, context, max_seq_len, doc_stride)
        windows = [
            [token for token, real in zip(each.ids, each.attention_mask, strict=True) if real]
            for each in expected.encodings
        ]
        assert [piece.ids.tolist() for piece in task.prepare([item])[0]] == windows


@pytest.mark.parametrize("context", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 7, "handle_impossible_answer": True},
        {"top_k": 5, "max_answer_len": 3, "max_seq_len": 48, "doc_stride": 5},
    ],
    ids=["plain", "many", "narrow"],
)
def test_answers_are_those_of_the_pipeline(folder, context, options):
    names = {"max_answer_len": "longest", "handle_impossible_answer": "impossible"}
    expected = truth(folder, QUESTION, context, **{names.get(name, name): each for name, each in options.items()})
    same(answered(task_of(folder), model_of(folder), [row(context=context, **options)])[0], expected)


def test_spans_are_characters_of_the_context_and_scores_fall(bert):
    context = "🙂🙂 " + LONG
    for answer, below in zip(found := answered(task_of(bert), model_of(bert), [row(context=context, top_k=20)])[0],
                             [*found[1:], found[-1]], strict=True):  # fmt: skip
        assert context[answer.start : answer.end] == answer.answer
        assert answer.score >= below.score


def test_fewer_spans_than_asked(bert):
    found = answered(task_of(bert), model_of(bert), [row(context="good bad", top_k=50)])[0]
    assert {each.answer for each in found} == {"good", "bad", "good bad"}


def test_a_word_cut_by_a_window_stays_within_it():
    context = Context.of([(0, 3), (3, 6), (6, 9), (10, 12)], [0, 0, 0, 1])
    assert np.array(Window(context, 1, 4, 2).characters(np.array([0, 1]), np.array([0, 2]))).tolist() == [
        [3, 3],
        [9, 12],
    ]
    unknown = Context.of([(0, 3), (3, 6)], [None, None])
    assert np.array(Window(unknown, 0, 2, 2).characters(np.array([1]), np.array([1]))).tolist() == [[3], [6]]


def test_best_spans_are_those_of_a_search_through_all():
    first, last = np.random.default_rng(0).random((2, 9), np.float32)
    every = {(begin, end): first[begin] * last[end] for begin in range(9) for end in range(begin, min(begin + 4, 9))}
    begins, ends, scores = best(first, last, 4, 8)
    expected = sorted(every, key=lambda span: -every[span])[:8]
    assert [*zip(begins.tolist(), ends.tolist(), strict=True)] == expected
    assert scores.tolist() == [every[span] for span in expected]
    assert len(best(first, last, 4, 1000)[0]) == len(every)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (row(question=" "), "question is empty"),
        (row(context=""), "context is empty"),
        ({"question": b"who"}, "context is missing"),
        (row(top_k=0), "top_k must be from 1 to 100, not 0"),
        (row(max_seq_len=65), "max_seq_len must be from 5 to 64, not 65"),
        (row(doc_stride=64), "doc_stride must be from 0 to 63, not 64"),
        ({"question": b"\xff", "context": b"a"}, "question is not valid UTF-8"),
    ],
)
def test_bad_values_are_named(bert, given, reason):
    with pytest.raises(InvalidInput, match=reason):
        task_of(bert).parse(given)


def test_what_does_not_fit_is_refused_with_its_numbers_and_alone(bert):
    task = task_of(bert, max_texts=8)
    rows = [row(question="and " * 40), row(context=SHORT), row(doc_stride=63), row()]
    too_long, fine, no_room, too_many = task.prepare([task.parse(each) for each in rows])
    assert len(fine) == 1
    assert "it takes 123 of max_seq_len 64" in str(too_long) and "doc_stride 32" in str(too_long)
    assert isinstance(no_room, InvalidInput) and "doc_stride 63" in str(no_room)
    assert "limit is 8 (max_texts)" in str(too_many)
    assert len(task.prepare([task.parse(row(question="and " * 10, context="good"))])[0]) == 1


def test_through_a_rank_with_neighbours_and_a_bad_one(bert):
    requests = [row(top_k=3), row(context="good", top_k=3)], [row(question="")], [row(context=SHORT)]
    with served("qa", bert, step_tokens=256) as ask:
        two, bad, one = ask.together(*requests)
    assert isinstance(bad, InvalidInput)
    expected = truth(bert, QUESTION, LONG, top_k=3)
    assert [text.decode() for text in two["answer"][0]] == [text for text, *_ in expected]
    np.testing.assert_allclose(two["score"][0], [score for _, score, *_ in expected], rtol=2e-4)
    assert two["answer"][1].tolist() == [b"good", b"", b""]
    assert two["start"][1].tolist() == [0, -1, -1] and two["end"].dtype == np.int32
    assert one["answer"].tolist() == [[truth(bert, QUESTION, SHORT)[0][0].encode()]]


@pytest.mark.slow
def test_two_hundred_questions_to_the_sample_with_long_contexts_among_them():
    folder = samples.fetch("qa")
    held = json.loads((folder / "heldout.json").read_text())
    rows = [(each["question"], each["context"]) for each in held[:180]]
    contexts = [each["context"] for each in held]
    rows += [(held[at]["question"], " ".join(contexts[at : at + 30])) for at in range(180, 200)]
    assert len(rows) == 200 and max(len(context) for _, context in rows) > 3000
    found = answered(task_of(folder), model_of(folder), [row(question, context) for question, context in rows])
    for answers, (question, context) in zip(found, rows, strict=True):
        same(answers, truth(folder, question, context, max_seq_len=384, doc_stride=128))
