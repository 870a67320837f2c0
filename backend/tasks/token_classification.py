"""token_classification: labelled tokens, words or entities, as transformers' pipeline finds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from backend.config import EngineConfig
from backend.errors import InvalidInput, ServingError
from backend.tasks.labels import check_head, labels_of, scores
from backend.tasks.task import Array, Row, decode, filled, text_of, texts
from backend.tasks.text import Piece, Texts, TextTask

AGGREGATIONS = ("none", "simple", "first", "average", "max")
OUTSIDE = "O"
"""The label of tokens that belong to nothing; they are left out."""


@dataclass(frozen=True)
class Item:
    text: str
    aggregation: str
    truncate: bool


@dataclass(frozen=True)
class Token:
    """A token that is part of the text."""

    place: int
    """In the sequence."""
    word: str
    start: int
    """Characters in the text."""
    end: int
    continues: bool
    """Whether it belongs to the word of the token before it."""


@dataclass(frozen=True)
class Entity:
    label: str
    score: float
    word: str
    start: int
    end: int


class TokenClassification(TextTask):
    """Entities of texts."""

    auto: ClassVar[str] = "AutoModelForTokenClassification"

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        super().__init__(folder, config)
        check_head(self.checkpoint, "TokenClassification")
        self.labels = labels_of(self.checkpoint)
        self.unknown = self.tokenizer.token_id(self.tokenizer.special_tokens.get("unk_token", ""))

    def parse(self, row: Row) -> Item:
        aggregation = decode(row["aggregation"], "aggregation") if "aggregation" in row else "simple"
        if aggregation not in AGGREGATIONS:
            raise InvalidInput(f"aggregation must be one of {', '.join(AGGREGATIONS)}, not {aggregation!r:.80}")
        return Item(text_of(row, "text", self.config.max_prompt_bytes), aggregation, bool(row.get("truncate", True)))

    def prepare(self, items: Sequence[Item]) -> list[list[Piece] | ServingError]:
        found = self.encode_truncated([item.text for item in items], [item.truncate for item in items])
        return [
            each if isinstance(each, ServingError) else [self.piece(each, notes=[*self._tokens(item.text, each)])]
            for item, each in zip(items, found, strict=True)
        ]

    def _tokens(self, text: str, encoding: Any) -> Iterator[Token]:
        columns = zip(encoding.ids, encoding.tokens, encoding.offsets, encoding.special_tokens_mask, strict=True)
        for place, (token_id, word, (start, end), special) in enumerate(columns):
            if special:
                continue
            if token_id == self.unknown:
                yield Token(place, text[start:end], start, end, False)
            else:
                yield Token(place, word, start, end, self._continues(text, word, start, end))

    def _continues(self, text: str, word: str, start: int, end: int) -> bool:
        """By the mark that WordPiece sets before such a token, else by the space before it, as the pipeline does."""
        if self.tokenizer.marks_subwords:
            return len(word) != end - start
        return start > 0 and " " not in text[start - 1 : start + 1]

    @staticmethod
    def forward(output: Any, batch: Texts, mask: Any) -> Any:
        """On a device.  # [n, longest, labels]"""
        return output.logits.float()

    def finish(self, item: Item, pieces: Sequence[Piece], answers: Sequence[Array]) -> list[Entity]:
        piece = pieces[0]
        likely = scores(answers[0][: len(piece.ids)], "softmax")  # [tokens, labels]
        if item.aggregation in ("none", "simple"):
            entities = [self._entity([token], likely[token.place], token.word) for token in piece.notes]
        else:
            entities = [self._word(group, likely, item.aggregation) for group in words(piece.notes)]
        if item.aggregation != "none":
            entities = [self._merged(group) for group in groups(entities)]
        return [entity for entity in entities if entity.label != OUTSIDE]

    def _word(self, tokens: Sequence[Token], likely: Array, aggregation: str) -> Entity:
        rows = likely[[token.place for token in tokens]]  # [tokens of the word, labels]
        word = self.tokenizer.join([token.word for token in tokens])
        if aggregation == "average":
            return self._entity(tokens, rows.mean(0), word)
        return self._entity(tokens, rows[0 if aggregation == "first" else rows.max(1).argmax()], word)

    def _entity(self, tokens: Sequence[Token], likely: Array, word: str) -> Entity:
        best = int(likely.argmax())
        return Entity(self.labels[best], likely[best], word, tokens[0].start, tokens[-1].end)

    def _merged(self, entities: Sequence[Entity]) -> Entity:
        return Entity(
            entities[0].label.split("-", 1)[-1],
            np.mean([entity.score for entity in entities], dtype=np.float32).item(),
            self.tokenizer.join([entity.word for entity in entities]),
            entities[0].start,
            entities[-1].end,
        )

    def outputs(self, results: Sequence[list[Entity]]) -> dict[str, Array]:
        return {
            "entity": texts([[entity.label for entity in result] for result in results]),
            "score": filled([[entity.score for entity in result] for result in results], 0.0, np.float32),
            "word": texts([[entity.word for entity in result] for result in results]),
            "start": filled([[entity.start for entity in result] for result in results], -1, np.int32),
            "end": filled([[entity.end for entity in result] for result in results], -1, np.int32),
        }


def words(tokens: Sequence[Token]) -> list[list[Token]]:
    """Tokens of one word together."""
    found: list[list[Token]] = []
    for token in tokens:
        if found and token.continues:
            found[-1].append(token)
        else:
            found.append([token])
    return found


def groups(entities: Sequence[Entity]) -> list[list[Entity]]:
    """Neighbours of one kind together, up to the next that begins one (B-)."""
    found: list[list[Entity]] = []
    for entity in entities:
        if found and _kind(entity) == _kind(found[-1][-1]) and not entity.label.startswith("B-"):
            found[-1].append(entity)
        else:
            found.append([entity])
    return found


def _kind(entity: Entity) -> str:
    """The label without its B- or I-."""
    return entity.label[2:] if entity.label.startswith(("B-", "I-")) else entity.label
