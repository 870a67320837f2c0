"""token_classification against transformers' pipeline: every aggregation, on tiny random models."""

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import transformers

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

import tiny_encoders
from serving_tasks import served

from backend.errors import InvalidInput
from backend.tasks.token_classification import AGGREGATIONS

LABELS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC", 5: "MISC-X"}
TEXTS = [
    "Anna Smith of Berlin writes to the United Nations",
    "Über naïve cafés in São Paulo: 東京 🙂 is   the capital of Japan, isn't it?",
    "e\u0301 \u2603 unaffable\nwriting, boringly (film) [SEP] good",
    "wonderful movie. " * 40,
    ".",
]


@pytest.fixture(scope="module", params=["bert", "roberta", "deberta-v2"])
def case(request, tmp_path_factory):
    """How to ask the service, and the pipeline."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_encoders.write(
        folder, request.param, "AutoModelForTokenClassification", id2label=LABELS, initializer_range=0.6
    )
    pipe = transformers.pipeline("token-classification", model=str(folder), device="cpu")
    with served("token_classification", folder) as ask:
        yield ask, pipe


def expected(pipe, text, aggregation):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its heuristic for tokenizers that mark no words
        found = pipe(text, aggregation_strategy=aggregation)
    return [
        (entry.get("entity_group") or entry["entity"], entry["word"], entry["start"], entry["end"], entry["score"])
        for entry in found
    ]


def entities(found, at):
    columns = (found[name][at] for name in ("entity", "word", "start", "end", "score"))
    rows = [*zip(*columns, strict=True)]
    count = sum(label != b"" for label, *_ in rows)
    assert all(row == (b"", b"", -1, -1, 0) for row in rows[count:])
    return [(label.decode(), word.decode(), *rest) for label, word, *rest in rows[:count]]


def check(found, at, wanted):
    rows = entities(found, at)
    assert [row[:-1] for row in rows] == [row[:-1] for row in wanted]
    np.testing.assert_allclose([row[-1] for row in rows], [row[-1] for row in wanted], atol=1e-5)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_equals_the_pipeline_whatever_the_neighbours(case, aggregation):
    ask, pipe = case
    found = ask(*({"text": text.encode(), "aggregation": aggregation.encode()} for text in TEXTS))
    for at, text in enumerate(TEXTS):
        check(found, at, expected(pipe, text, aggregation))


def test_offsets_count_characters_and_simple_is_the_default(case):
    ask, pipe = case
    found = ask({"text": TEXTS[1].encode()}, {"text": TEXTS[0].encode(), "aggregation": b"none"})
    check(found, 0, expected(pipe, TEXTS[1], "simple"))
    check(found, 1, expected(pipe, TEXTS[0], "none"))
    assert found["end"].max() <= len(TEXTS[1]) < len(TEXTS[1].encode())


def test_bad_rows_fail_alone(case):
    ask, pipe = case
    good, *bad = ask.together(
        [{"text": b"Berlin"}], [{"text": b"a", "aggregation": b"most"}], [{"text": b"\xff"}], [{}],
        [{"text": TEXTS[3].encode(), "truncate": False}],
    )  # fmt: skip
    check(good, 0, expected(pipe, "Berlin", "simple"))
    assert all(isinstance(error, InvalidInput) for error in bad)
    named = ["aggregation must be one of none, simple", "text is not valid", "text is missing", "takes 64"]
    for error, words in zip(bad, named, strict=True):
        assert words in str(error)
