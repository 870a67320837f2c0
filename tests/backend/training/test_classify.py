"""The sentiment classifier's training: which sentences it takes, what it leaves behind."""

import io
import json
import tarfile

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from backend.training import classify
from backend.training.steps import settle

ROWS = [f"{i}\t{(i % 5 - 2) / 2}\tsentence &amp; number {i}" for i in range(50)]


def add(archive, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def sdist(tmp_path):
    """Of vaderSentiment's shape: an archive in an archive, tab-separated lines in some of its files."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        add(archive, "hutto_ICWSM_2014/tweets_GroundTruth.txt", "\n".join(ROWS).encode())
        add(archive, "hutto_ICWSM_2014/tweets_anonDataRatings.txt", b"1\t2\t[3]\n")
        add(archive, "hutto_ICWSM_2014/vader_sentiment_lexicon.txt", b"no rows\n")
    path = tmp_path / "vader.tar.gz"
    with tarfile.open(path, mode="w:gz") as archive:
        add(archive, "vader/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return path


def test_clear_sentences_are_read_and_the_others_left(sdist):
    rows = list(classify.read(sdist))
    assert rows[:5] == [(f"sentence & number {i}", label) for i, label in [(0, 0), (1, 0), (3, 1), (4, 1), (5, 0)]]
    assert len(rows) == 40


def test_it_leaves_a_model_with_names_and_what_it_has_not_seen(sdist, encoder, tmp_path):
    metrics = classify.train(sdist, encoder, tmp_path / "model", classify.Amount(trained=24, held_out=10))
    assert metrics["trained_on"] == 24 and metrics["of"] == 10 and 0 <= metrics["accuracy"] <= 1
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert model.config.id2label == {0: "NEGATIVE", 1: "POSITIVE"}
    held_out = json.loads((tmp_path / "model" / "heldout.json").read_text())
    truth = {text: classify.LABELS[label] for text, label in classify.read(sdist)}
    assert len(held_out) == 10 and all(truth[row["text"]] == row["label"] for row in held_out)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").model_max_length == 512
    assert {path.suffix for path in (tmp_path / "model").iterdir()} <= {".json", ".safetensors", ".txt"}


def test_it_learns(encoder):
    settle(0)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    rows = [("good" if i % 2 else "evil", i % 2) for i in range(classify.BATCH * 150)]
    model = classify._model(encoder)
    frozen = [weight.clone() for weight in model.bert.encoder.layer[: classify.FROZEN].parameters()]
    classify._learn(model, tokenizer, rows)
    assert classify.accuracy(model, tokenizer, rows[:64]) == 1.0
    now = model.bert.encoder.layer[: classify.FROZEN].parameters()
    assert all((before == after).all() for before, after in zip(frozen, now, strict=True))
