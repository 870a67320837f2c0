"""classify against transformers' text-classification pipeline on tiny random models."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

import tiny_encoders
from serving_tasks import served

from backend.config import EngineConfig
from backend.errors import InvalidInput, LoadError
from backend.tasks.classify import Classify
from backend.tasks.labels import best, scores, scoring
from backend.tasks.rerank import Rerank
from backend.tasks.token_classification import TokenClassification

TEXTS = ["I loved the wonderful movie", "Über naïve cafés in 東京 🙂", "", "boring " * 90, "What is the answer?"]
LABELS = {0: "bad", 1: "good", 2: "awful", 3: "great"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_encoders.write(tmp_path_factory.mktemp("bert"), "bert", id2label=LABELS)


@pytest.fixture(scope="module")
def ask(folder):
    with served("classify", folder) as ask:
        yield ask


def expected(folder, texts, **options):
    pipe = transformers.pipeline("text-classification", model=str(folder), device="cpu")
    return [pipe(text, top_k=None, truncation=True, **options) for text in texts]


def check(outputs, rows):
    assert outputs["score"].dtype == np.float32
    for labels, values, row in zip(outputs["label"], outputs["score"], rows, strict=True):
        assert [label.decode() for label in labels] == [entry["label"] for entry in row]
        np.testing.assert_allclose(values, [entry["score"] for entry in row], atol=1e-5)


def test_equals_the_pipeline_whatever_the_neighbours(ask, folder):
    found = ask(*({"text": text.encode()} for text in TEXTS))
    check(found, expected(folder, TEXTS))
    alone = [ask({"text": text.encode()})["score"][0] for text in TEXTS]
    np.testing.assert_allclose(found["score"], alone, atol=1e-6)


def test_pairs_and_raw_scores(ask, folder):
    pair = {"text": "I loved it", "text_pair": "She hated that, isn't it?"}
    row = {name: text.encode() for name, text in pair.items()}
    check(ask(row), expected(folder, [pair]))
    check(ask({**row, "raw_scores": True}), expected(folder, [pair], function_to_apply="none"))
    long = {"text": "good " * 50, "text_pair": "bad " * 40}
    check(ask({name: text.encode() for name, text in long.items()}), expected(folder, [long]))


def test_top_k_differs_by_row_and_is_filled(ask):
    found = ask({"text": b"good", "top_k": 1}, {"text": b"good", "top_k": 3}, {"text": b"good", "top_k": 9})
    assert [sum(label != b"" for label in row) for row in found["label"]] == [1, 3, 4]
    assert found["score"].shape == (3, 4) and found["score"][0, 1:].tolist() == [0, 0, 0]
    assert found["label"][0, 0] == found["label"][2, 0]


def test_bad_rows_fail_alone(ask):
    long = {"text": b"boring " * 90, "truncate": False}
    good, *bad = ask.together(
        [{"text": b"good"}], [long], [{}], [{"text": b"\xff"}], [{"text": b"a", "text_pair": b"\xff"}],
        [{"text": b"a", "top_k": 0}],
    )  # fmt: skip
    assert set(good) == {"label", "score"}
    assert all(isinstance(error, InvalidInput) for error in bad)
    for error, words in zip(bad, ["64", "text is missing", "text is not", "text_pair is not", "top_k"], strict=True):
        assert words in str(error)
    assert "182 tokens" in str(bad[0])


@pytest.mark.parametrize(
    ("kind", "labels", "expected"),
    [
        (None, 1, "sigmoid"), (None, 3, "softmax"), ("single_label_classification", 3, "softmax"),
        ("multi_label_classification", 3, "sigmoid"), ("regression", 1, "none"), ("regression", 3, "none"),
    ],
)  # fmt: skip
def test_scoring_is_the_pipelines(tmp_path, kind, labels, expected):
    assert scoring({"problem_type": kind}, labels) == expected
    folder = tiny_encoders.write(tmp_path, "bert", num_labels=labels, problem_type=kind)
    pipe = transformers.pipeline("text-classification", model=str(folder), device="cpu")
    with torch.no_grad():
        logits = pipe.model(**pipe.tokenizer("good", return_tensors="pt")).logits[0].numpy()
    task = Classify(folder, EngineConfig(model=str(folder)))
    result = task.finish(task.parse({"text": b"good"}), [], [logits])
    wanted = pipe("good", top_k=None)
    assert result.labels == [entry["label"] for entry in wanted]
    assert result.scores == pytest.approx([entry["score"] for entry in wanted], abs=1e-6)


def test_scores_of_extremes_are_finite_and_ties_keep_their_order():
    assert scores(np.float32([-200, 0, 200]), "sigmoid").tolist() == [0, 0.5, 1]
    assert scores(np.float32([200, -200]), "softmax").tolist() == [1, 0]
    assert best(np.float32([1, 2, 1, 2])) == [1, 3, 0, 2]


@pytest.mark.parametrize(("task", "other"), [(Classify, "Token"), (Rerank, "Token"), (TokenClassification, "Sequence")])
def test_a_model_with_another_head_is_refused(tmp_path, task, other):
    folder = tiny_encoders.write(tmp_path, "bert", f"AutoModelFor{other}Classification")
    with pytest.raises(LoadError, match=f"BertFor{other}Classification, which is not"):
        task(folder, EngineConfig(model=str(folder)))


@pytest.mark.slow
def test_two_ranks_give_the_same(folder):
    with served("classify", folder, tensor_parallel=2) as ask:
        check(ask(*({"text": text.encode()} for text in TEXTS)), expected(folder, TEXTS))
