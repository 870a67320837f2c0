"""qa: a question and a context in, the likeliest spans of the context out. Long contexts are read window by window.

Its answers are those of the question-answering pipeline that transformers had until release 5: each window has
probabilities of its own, spans are widened to whole words, and answers of equal text are one, their scores added up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from backend.config import EngineConfig
from backend.errors import InvalidInput, LoadError, ServingError
from backend.tasks.task import Array, Row, filled, number, text_of, texts
from backend.tasks.text import Piece, Texts, TextTask

MOST_ANSWERS = 100


@dataclass(frozen=True)
class Item:
    question: str
    context: str
    top_k: int
    doc_stride: int
    """Tokens that a window shares with the one before it."""
    max_answer_len: int
    """Tokens."""
    max_seq_len: int
    """Tokens of a window, with the question and the special tokens."""
    handle_impossible_answer: bool


@dataclass(frozen=True)
class Context:
    """A context's tokens: their characters, and the first and the last token of the word that each is in."""

    starts: NDArray[np.int64]  # [tokens]
    ends: NDArray[np.int64]  # [tokens]
    first: NDArray[np.int64]  # [tokens]
    last: NDArray[np.int64]  # [tokens]
    in_word: NDArray[np.bool_]  # [tokens]

    @classmethod
    def of(cls, offsets: Sequence[tuple[int, int]], words: Sequence[int | None]) -> Context:
        places = np.arange(len(words))
        numbers = np.array([-1 if word is None else word for word in words])
        new = np.diff(numbers, prepend=-2) != 0
        first = np.maximum.accumulate(np.where(new, places, 0))
        last = np.append(places[new][1:] - 1, places[-1])[np.cumsum(new) - 1]
        chars = np.array(offsets, np.int64)
        return cls(chars[:, 0], chars[:, 1], first, last, numbers >= 0)


@dataclass(frozen=True)
class Window:
    """Tokens `begin` to `end` of a context, and how many tokens stand before them in the sequence."""

    context: Context
    begin: int
    end: int
    before: int

    def characters(self, first: Array, last: Array) -> tuple[Array, Array]:
        """Of spans of the window's tokens, widened to whole words as far as the window has them."""
        first, last, context = first + self.begin, last + self.begin, self.context
        aligned = context.in_word[first] & context.in_word[last]
        left = np.where(aligned, np.maximum(context.first[first], self.begin), first)
        right = np.where(aligned, np.minimum(context.last[last], self.end - 1), last)
        return context.starts[left], context.ends[right]


@dataclass
class Answer:
    answer: str
    score: float
    start: int
    end: int


class QuestionAnswering(TextTask):
    """Answers that are spans of a text."""

    auto: ClassVar[str] = "AutoModelForQuestionAnswering"

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        super().__init__(folder, config)
        pair = self.encode([("a", "a")])[0]
        parts = pair.sequence_ids
        if parts[0] is not None or [part for part in parts if part is not None] != [0, 1]:
            raise LoadError(f"the tokenizer in {folder} does not make pairs of a first token, a question and a context")
        self.special = len(pair.ids) - 2
        """Tokens around and between the two texts."""

    def parse(self, row: Row) -> Item:
        question, context = (self._text(row, name) for name in ("question", "context"))
        max_seq_len = number(row, "max_seq_len", min(384, self.longest), self.special + 2, self.longest)
        return Item(
            question,
            context,
            number(row, "top_k", 1, 1, MOST_ANSWERS),
            number(row, "doc_stride", min(128, max_seq_len // 2), 0, max_seq_len - 1),
            number(row, "max_answer_len", 15, 1, self.longest),
            max_seq_len,
            bool(row.get("handle_impossible_answer", False)),
        )

    def _text(self, row: Row, name: str) -> str:
        text = text_of(row, name, self.config.max_prompt_bytes)
        if not text.strip():
            raise InvalidInput(f"{name} is empty")
        return text

    def prepare(self, items: Sequence[Item]) -> list[list[Piece] | ServingError]:
        encodings = self.encode([(item.question, item.context) for item in items])
        found: list[list[Piece] | ServingError] = []
        for item, encoding in zip(items, encodings, strict=True):
            try:
                found.append(self._pieces(item, encoding))
            except ServingError as error:
                found.append(error)
        return found

    def _pieces(self, item: Item, encoding: Any) -> list[Piece]:
        """A sequence for each window: the pair's own, with a part of the context in place of the whole."""
        parts = np.array([-1 if part is None else part for part in encoding.sequence_ids])
        places = np.flatnonzero(parts == 1)
        if not len(places):
            raise InvalidInput("context has no tokens")
        before, after = int(places[0]), int(places[-1]) + 1
        windows = self._windows(item, len(places), len(parts) - len(places))
        context = Context.of(encoding.offsets[before:after], encoding.word_ids[before:after])
        ids, types = (np.array(values, np.int32) for values in (encoding.ids, encoding.type_ids))

        def cut(values: NDArray[np.int32], begin: int, end: int) -> NDArray[np.int32]:
            return np.concatenate([values[:before], values[before + begin : before + end], values[after:]])

        return [Piece(cut(ids, *at), cut(types, *at), notes=Window(context, *at, before)) for at in windows]

    def _windows(self, item: Item, tokens: int, others: int) -> list[tuple[int, int]]:
        """Parts of so many tokens that fit beside the `others`, each with `doc_stride` tokens of the one before."""
        room = item.max_seq_len - others
        if tokens <= room:
            return [(0, tokens)]
        if room <= item.doc_stride:
            raise InvalidInput(
                f"question is too long: with {self.special} special tokens it takes {others} of max_seq_len "
                f"{item.max_seq_len}, and what is left to the context must be more than doc_stride {item.doc_stride}"
            )
        count = -(-(tokens - room) // (room - item.doc_stride)) + 1
        if count > self.config.max_texts:
            raise InvalidInput(f"context makes {count} windows, the limit is {self.config.max_texts} (max_texts)")
        begins = range(0, count * (room - item.doc_stride), room - item.doc_stride)
        return [(begin, min(begin + room, tokens)) for begin in begins]

    @staticmethod
    def forward(output: Any, batch: Texts, mask: Any) -> Any:
        """On a device: the logits of an answer's first and last token.  # -> [n, longest, 2]"""
        first = output.start_logits.float()
        both = first.new_empty((*first.shape, 2))
        both[..., 0], both[..., 1] = first, output.end_logits.float()
        return both

    def finish(self, item: Item, pieces: Sequence[Piece], answers: Sequence[Array]) -> list[Answer]:
        found: dict[str, Answer] = {}
        nothing = float("inf")
        for piece, logits in zip(pieces, answers, strict=True):
            first, last, null = probabilities(logits, piece.notes)
            nothing = min(nothing, null)
            spans = best(first, last, item.max_answer_len, 2 * item.top_k + 10)
            for each in read(item.context, piece.notes, *spans):
                if (known := found.setdefault(each.answer.lower(), each)) is not each:
                    known.score += each.score
        ordered = [*found.values(), *([Answer("", nothing, 0, 0)] if item.handle_impossible_answer else [])]
        return sorted(ordered, key=lambda each: -each.score)[: item.top_k]

    def outputs(self, results: Sequence[Sequence[Answer]]) -> dict[str, Array]:
        return {
            "answer": texts([[each.answer for each in row] for row in results]),
            "score": filled([[each.score for each in row] for row in results], 0.0, np.float32),
            "start": filled([[each.start for each in row] for row in results], -1, np.int32),
            "end": filled([[each.end for each in row] for row in results], -1, np.int32),
        }


def probabilities(logits: Array, window: Window) -> tuple[Array, Array, float]:
    """Of each context token to begin and to end the answer, and that there is none, which is the first token's.

    [longest, 2] -> [tokens], [tokens], a number
    """
    kept = logits[window.before - 1 : window.before + window.end - window.begin].copy()
    kept[0] = logits[0]
    if not np.isfinite(kept).all():
        raise ServingError("the model's logits are not numbers; load it with dtype bfloat16 or float32")
    shares = np.exp(kept - kept.max(0))
    shares /= shares.sum(0)
    return shares[1:, 0], shares[1:, 1], float(shares[0, 0] * shares[0, 1])


def best(first: Array, last: Array, longest: int, count: int) -> tuple[Array, Array, Array]:
    """The `count` likeliest spans of at most `longest` tokens, likeliest first: their ends and their scores."""
    width = min(longest, len(last))
    behind = np.lib.stride_tricks.sliding_window_view(np.pad(last, (0, width - 1)), width)
    scores = (first[:, None] * behind).ravel()  # of spans by first token and length
    likeliest = np.argpartition(-scores, count)[:count] if count < len(scores) else np.arange(len(scores))
    likeliest = likeliest[np.argsort(-scores[likeliest], kind="stable")]
    begins, more = np.divmod(likeliest[scores[likeliest] > 0], width)  # 0: beyond the last token
    return begins, begins + more, scores[begins * width + more]


def read(context: str, window: Window, first: Array, last: Array, scores: Array) -> Iterator[Answer]:
    """Spans as answers."""
    starts, ends = window.characters(first, last)
    for start, end, score in zip(starts.tolist(), ends.tolist(), scores.tolist(), strict=True):
        yield Answer(context[start:end], score, start, end)
