"""A question answerer: `python -m backend.training.qa ENCODER FOLDER`.

ENCODER is all-MiniLM-L6-v2; the questions are about made-up people (backend.training.facts). It knows no other subject.
"""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForQuestionAnswering, AutoTokenizer

from backend.training.facts import Example, examples
from backend.training.steps import alike, bar, draw, falling, mixed, save_json, settle, step

BATCH = 16
LENGTH = 384
UNANSWERED = 0.15
"""Share of the questions whose answer is not there. They teach the model to point at its first token then, which keeps
the parts of a long text that lack the answer from winning over the part that has it.
"""
LONGEST_ANSWER = 15
"""Tokens, as in transformers' pipeline."""


@dataclass(frozen=True)
class Amount:
    """How many questions are trained on, and how many are kept to judge by."""

    trained: int = 280 * BATCH
    held_out: int = 300


def train(encoder: Path, folder: Path, amount: Amount = Amount()) -> dict[str, float]:
    """Writes the model, heldout.json with questions in unseen words, and metrics.json with its exact matches."""
    settle(seed=0)
    seen = list(islice(examples(1, held_out=False, unanswered=UNANSWERED), amount.trained))
    held_out = list(islice(examples(2, held_out=True), amount.held_out))
    unanswered = list(islice(examples(3, held_out=True, unanswered=1.0), amount.held_out))
    tokenizer = AutoTokenizer.from_pretrained(encoder, model_max_length=512)
    model = AutoModelForQuestionAnswering.from_pretrained(encoder)
    _learn(model, tokenizer, seen)
    metrics = {
        "exact_match": exact_match(model, tokenizer, held_out),
        "exact_match_unanswered": exact_match(model, tokenizer, unanswered),
        "trained_on": len(seen),
        "of": len(held_out),
    }
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_json(folder / "heldout.json", [asdict(example) for example in held_out])
    save_json(folder / "metrics.json", metrics)
    return metrics


def _learn(model: Any, tokenizer: Any, seen: Sequence[Example]) -> None:
    model.bert.embeddings.requires_grad_(False)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    batches = draw(_batches(seen))
    optimizer = torch.optim.AdamW(weights, lr=3e-4)
    schedule = falling(optimizer, len(batches), warm=40)
    model.train()
    for i in bar(len(batches), "qa"):
        read = _read(tokenizer, batches[i])
        with mixed():
            logits = _logits(model, read)
        step(F.cross_entropy(logits.float(), _ends(read, batches[i])), weights, optimizer, schedule)
    model.eval()


def _batches(rows: Sequence[Example]) -> list[list[Example]]:
    return alike(rows, BATCH, lambda example: len(example.context))


def _read(tokenizer: Any, rows: Sequence[Example]) -> Any:
    questions, contexts = [row.question for row in rows], [row.context for row in rows]
    return tokenizer(
        questions, contexts, padding=True, truncation="only_second", max_length=LENGTH, return_tensors="pt"
    )


def _logits(model: Any, read: Any) -> Tensor:
    """Of the answer's first token and of its last: [rows, tokens, 2]."""
    output = model(**read)
    return torch.stack([output.start_logits, output.end_logits], dim=-1)


def _ends(read: Any, rows: Sequence[Example]) -> Tensor:
    """The answers' first and last tokens, the text's first for what has no answer: [rows, 2]."""
    return torch.tensor([_span(read, i, row) if row.answer else (0, 0) for i, row in enumerate(rows)])


def _span(read: Any, i: int, row: Example) -> tuple[int, int]:
    first, last = row.start, row.start + len(row.answer) - 1
    return read.char_to_token(i, first, sequence_index=1), read.char_to_token(i, last, sequence_index=1)


@torch.no_grad()
def exact_match(model: Any, tokenizer: Any, rows: Sequence[Example]) -> float:
    """The share of the questions whose likeliest span is the answer to the character, or none where there is none."""
    right = 0
    for batch in _batches(rows):
        read = _read(tokenizer, batch)
        logits = _logits(model, read)
        right += sum(_answer(read, i, logits[i], row.context) == row.answer for i, row in enumerate(batch))
    return right / len(rows)


def _answer(read: Any, i: int, logits: Tensor, context: str) -> str:
    """The likeliest span within the context, LONGEST_ANSWER tokens at most; "" where none is likelier."""
    outside = torch.tensor([part != 1 for part in read.sequence_ids(i)])
    first, last = logits.masked_fill(outside[:, None], -torch.inf).unbind(-1)
    allowed = torch.ones(len(first), len(last), dtype=torch.bool).triu().tril(LONGEST_ANSWER - 1)
    spans = (first[:, None] + last).masked_fill(~allowed, -torch.inf)
    if spans.max() < logits[0].sum():
        return ""
    start, end = divmod(int(spans.argmax()), len(last))
    return context[read.token_to_chars(i, start).start : read.token_to_chars(i, end).end]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m backend.training.qa")
    for name in ("encoder", "folder"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args(arguments)
    print(json.dumps(train(options.encoder, options.folder)))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word: nothing is half written
    main()
