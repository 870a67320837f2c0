"""classify: the labels of a text, or of a pair of texts, best first, as transformers' text-classification pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from backend.config import EngineConfig
from backend.errors import ServingError
from backend.tasks.labels import best, check_head, labels_of, scores, scoring
from backend.tasks.task import Array, Row, filled, number, text_of, texts
from backend.tasks.text import Piece, Texts, TextTask


@dataclass(frozen=True)
class Item:
    text: str | tuple[str, str]
    top_k: int
    raw_scores: bool
    truncate: bool


@dataclass(frozen=True)
class Classes:
    labels: list[str]
    scores: list[float]


class Classify(TextTask):
    """Labels of texts."""

    auto: ClassVar[str] = "AutoModelForSequenceClassification"

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        super().__init__(folder, config)
        check_head(self.checkpoint, "SequenceClassification")
        self.labels = labels_of(self.checkpoint)
        self.scoring = scoring(self.checkpoint.config, len(self.labels))

    def parse(self, row: Row) -> Item:
        limit = self.config.max_prompt_bytes
        text = text_of(row, "text", limit)
        return Item(
            (text, text_of(row, "text_pair", limit)) if "text_pair" in row else text,
            number(row, "top_k", len(self.labels), 1, 2**31 - 1),  # more than there are: all of them
            bool(row.get("raw_scores", False)),
            bool(row.get("truncate", True)),
        )

    def prepare(self, items: Sequence[Item]) -> list[list[Piece] | ServingError]:
        found = self.encode_truncated([item.text for item in items], [item.truncate for item in items])
        return [each if isinstance(each, ServingError) else [self.piece(each)] for each in found]

    @staticmethod
    def forward(output: Any, batch: Texts, mask: Any) -> Any:
        """On a device.  # [n, labels]"""
        return output.logits.float()

    def finish(self, item: Item, pieces: Sequence[Piece], answers: Sequence[Array]) -> Classes:
        values = answers[0] if item.raw_scores else scores(answers[0], self.scoring)
        places = best(values, item.top_k)
        return Classes([self.labels[place] for place in places], values[places].tolist())

    def outputs(self, results: Sequence[Classes]) -> dict[str, Array]:
        return {
            "label": texts([result.labels for result in results]),
            "score": filled([result.scores for result in results], 0.0, np.float32),
        }
