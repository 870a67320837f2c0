"""rerank against sentence-transformers' CrossEncoder on a tiny random model."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "fakes"))

import tiny_encoders
from serving_tasks import served

from backend.config import EngineConfig
from backend.errors import InvalidInput, LoadError
from backend.tasks.rerank import Rerank

QUERY = "What is the capital of Japan?"
TEXTS = ["東京 is the capital", "good", "Über naïve cafés 🙂", "boring " * 90, "", "the lazy dog", "Nobody knows."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_encoders.write(tmp_path_factory.mktemp("bert"), "bert", num_labels=1)


@pytest.fixture(scope="module")
def ask(folder):
    with served("rerank", folder, max_texts=8) as ask:
        yield ask


def row(texts=TEXTS, query=QUERY, **options):
    return {"query": query.encode(), "texts": [text.encode() for text in texts], **options}


def expected(folder, texts=TEXTS, query=QUERY, raw=False):
    from sentence_transformers import CrossEncoder

    encoder = CrossEncoder(str(folder), device="cpu", local_files_only=True)
    activation = torch.nn.Identity() if raw else None
    return encoder.predict([(query, text) for text in texts], activation_fn=activation, show_progress_bar=False)


def check(found, scores):
    """Best first, each with its own score."""
    order = np.argsort(-scores, kind="stable")
    assert found["index"][0].tolist() == order.tolist()
    np.testing.assert_allclose(found["score"][0], scores[order], atol=1e-5)


def test_equals_cross_encoder(ask, folder):
    check(ask(row()), expected(folder))
    check(ask(row(raw_scores=True)), expected(folder, raw=True))
    assert (np.diff(ask(row())["score"][0]) <= 0).all()


def test_rows_and_requests_beside_each_other_change_nothing(ask):
    alone = ask(row(TEXTS[:3], query="good book"))
    both, other = ask.together([row(), row(TEXTS[:3], query="good book", top_k=2)], [row(TEXTS[:1])])
    assert both["index"].shape == (2, 7) and both["index"][1].tolist() == [*alone["index"][0, :2], *[-1] * 5]
    np.testing.assert_allclose(both["score"][1, :2], alone["score"][0, :2], atol=1e-6)
    assert other["index"].tolist() == [[0]]
    assert ask(row(top_k=99))["index"].shape == (1, 7)


def test_bad_rows_fail_alone(ask):
    good, *bad = ask.together(
        [row(["good"])], [row([])], [{"query": b"a"}], [{"texts": [b"a"]}], [row(["a"] * 9)],
        [{"query": b"a", "texts": [b"a", b"\xff"]}], [row(truncate=False)], [row(top_k=0)],
    )  # fmt: skip
    assert good["index"].tolist() == [[0]]
    assert all(isinstance(error, InvalidInput) for error in bad)
    named = [
        "texts is missing",
        "texts is missing",
        "query is missing",
        "limit is 8 (max_texts)",
        "texts[1]",
        "texts[3]",
        "top_k",
    ]
    for error, words in zip(bad, named, strict=True):
        assert words in str(error)


def test_scores_as_the_folder_says(folder, tmp_path):
    def scoring(**stated):
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text()) | stated
        (copy / "config.json").write_text(json.dumps(config))
        return Rerank(copy, EngineConfig(model=str(copy))).scoring

    assert scoring() == "sigmoid"
    assert scoring(sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"}) == "none"
    assert scoring(sbert_ce_default_activation_function="torch.nn.modules.linear.Identity") == "none"
    with pytest.raises(LoadError, match="Tanh"):
        scoring(sentence_transformers={"activation_fn": "torch.nn.modules.activation.Tanh"})
    with pytest.raises(LoadError, match="one label"):
        scoring(id2label={"0": "a", "1": "b"})
