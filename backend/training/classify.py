"""A sentiment classifier: `python -m backend.training.classify SDIST ENCODER FOLDER`.

ENCODER is all-MiniLM-L6-v2. SDIST is vaderSentiment's, which holds the sentences, judged by people, of Hutto and
Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text, ICWSM 2014. It knows no
other data.
"""

from __future__ import annotations

import argparse
import html
import io
import json
import signal
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from backend.training.steps import alike, bar, draw, falling, mixed, save_json, settle, step

LABELS = ("NEGATIVE", "POSITIVE")
CLEAR = 0.5
"""The judges' mean, of -4 to 4, from which on a sentence counts as either; what lies between is left out."""
BATCH = 32
LENGTH = 64
FROZEN = 3
"""The lower layers stay as they are: half the time, and nothing lost."""

Row = tuple[str, int]


@dataclass(frozen=True)
class Amount:
    """How much of the data is trained on, and how much is kept to judge by."""

    trained: int = 14_000
    held_out: int = 1500


def train(sdist: Path, encoder: Path, folder: Path, amount: Amount = Amount()) -> dict[str, float]:
    """Writes the model, heldout.json with the texts it has not seen, and metrics.json with its accuracy on them."""
    settle(seed=0)
    rows = draw(list(dict.fromkeys(read(sdist))))
    held_out, seen = rows[: amount.held_out], rows[amount.held_out :][: amount.trained]
    tokenizer = AutoTokenizer.from_pretrained(encoder, model_max_length=512)
    model = _model(encoder)
    _learn(model, tokenizer, seen)
    metrics = {"accuracy": accuracy(model, tokenizer, held_out), "trained_on": len(seen), "of": len(held_out)}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_json(folder / "heldout.json", [{"text": text, "label": LABELS[label]} for text, label in held_out])
    save_json(folder / "metrics.json", metrics)
    return metrics


def read(sdist: Path) -> Iterator[Row]:
    """The clearly positive or negative sentences, each with its label's number."""
    with tarfile.open(sdist) as outer:
        (inner,) = (member for member in outer if member.name.endswith("/hutto_ICWSM_2014.tar.gz"))
        packed = outer.extractfile(inner)
        assert packed is not None
        with tarfile.open(fileobj=io.BytesIO(packed.read())) as data:
            for member in sorted(data.getnames()):
                if member.endswith("_GroundTruth.txt"):
                    yield from _rows(data, member)


def _rows(data: tarfile.TarFile, member: str) -> Iterator[Row]:
    file = data.extractfile(member)
    assert file is not None
    for line in file.read().decode("utf-8", errors="replace").splitlines():
        _, valence, text = line.split("\t", 2)
        if abs(float(valence)) >= CLEAR:
            yield html.unescape(text).strip(), int(float(valence) > 0)


def _model(encoder: Path) -> Any:
    names = dict(enumerate(LABELS))
    model = AutoModelForSequenceClassification.from_pretrained(
        encoder, num_labels=len(LABELS), id2label=names, label2id={name: i for i, name in names.items()}
    )
    for part in (model.bert.embeddings, *model.bert.encoder.layer[:FROZEN]):
        part.requires_grad_(False)
    return model.train()


def _learn(model: Any, tokenizer: Any, rows: Sequence[Row]) -> None:
    """Once through all rows."""
    batches = draw(_batches(rows))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=2e-4)
    schedule = falling(optimizer, len(batches), warm=20)
    for i in bar(len(batches), "classify"):
        with mixed():
            logits = _logits(model, tokenizer, batches[i])
        wanted = torch.tensor([label for _, label in batches[i]])
        step(F.cross_entropy(logits.float(), wanted), weights, optimizer, schedule)
    model.eval()


def _batches(rows: Sequence[Row]) -> list[list[Row]]:
    return alike(rows, BATCH, lambda row: len(row[0]))


def _logits(model: Any, tokenizer: Any, rows: Sequence[Row]) -> Tensor:
    texts = [text for text, _ in rows]
    logits: Tensor = model(
        **tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    ).logits
    return logits


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, rows: Sequence[Row]) -> float:
    right = 0
    for batch in _batches(rows):
        guessed = _logits(model, tokenizer, batch).argmax(dim=-1).tolist()
        right += sum(guess == label for guess, (_, label) in zip(guessed, batch, strict=True))
    return right / len(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m backend.training.classify")
    for name in ("sdist", "encoder", "folder"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args(arguments)
    print(json.dumps(train(options.sdist, options.encoder, options.folder)))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word: nothing is half written
    main()
