"""rerank: texts by how well they answer a query, best first, as sentence-transformers' CrossEncoder of one label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from backend.config import EngineConfig
from backend.errors import InvalidInput, LoadError, ServingError
from backend.model_folder import Checkpoint
from backend.tasks.labels import best, check_head, labels_of, scores
from backend.tasks.task import Array, Row, check_bytes, filled, number, text_of, texts_of
from backend.tasks.text import Piece, Texts, TextTask

_ACTIVATIONS = {"Sigmoid": "sigmoid", "Identity": "none"}


@dataclass(frozen=True)
class Item:
    query: str
    texts: list[str]
    top_k: int
    raw_scores: bool
    truncate: bool


@dataclass(frozen=True)
class Ranking:
    index: list[int]
    """Places in the request's texts."""
    scores: list[float]


class Rerank(TextTask):
    """Texts by a query: each with it makes one sequence."""

    auto: ClassVar[str] = "AutoModelForSequenceClassification"

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        super().__init__(folder, config)
        check_head(self.checkpoint, "SequenceClassification")
        if (count := len(labels_of(self.checkpoint))) != 1:
            raise LoadError(f"rerank takes a model of one label, {folder} has {count}: serve it as classify")
        self.scoring = _scoring(self.checkpoint)

    def parse(self, row: Row) -> Item:
        limit = self.config.max_prompt_bytes
        given = texts_of(row, "texts", self.config.max_texts, limit)
        query = text_of(row, "query", limit)
        check_bytes("query, repeated for each of texts,", [query] * len(given), limit)
        return Item(
            query,
            given,
            number(row, "top_k", len(given), 1, 2**31 - 1),  # more than there are: all of them
            bool(row.get("raw_scores", False)),
            bool(row.get("truncate", True)),
        )

    def prepare(self, items: Sequence[Item]) -> list[list[Piece] | ServingError]:
        pairs = [(item.query, text) for item in items for text in item.texts]
        may = [item.truncate for item in items for _ in item.texts]
        found = iter(self.encode_truncated(pairs, may))
        return [self._pieces([*islice(found, len(item.texts))]) for item in items]

    def _pieces(self, found: list[Any]) -> list[Piece] | ServingError:
        for at, each in enumerate(found):
            if isinstance(each, ServingError):
                return InvalidInput(f"query with texts[{at}]: {each}")
        return [self.piece(each) for each in found]

    @staticmethod
    def forward(output: Any, batch: Texts, mask: Any) -> Any:
        """On a device.  # [n, 1]"""
        return output.logits.float()

    def finish(self, item: Item, pieces: Sequence[Piece], answers: Sequence[Array]) -> Ranking:
        logits = np.concatenate(answers)  # [texts]
        places = best(logits, item.top_k)  # before the sigmoid, which makes high ones equal
        values = logits if item.raw_scores else scores(logits, self.scoring)
        return Ranking(places, values[places].tolist())

    def outputs(self, results: Sequence[Ranking]) -> dict[str, Array]:
        return {
            "index": filled([result.index for result in results], -1, np.int32),
            "score": filled([result.scores for result in results], 0.0, np.float32),
        }


def _scoring(checkpoint: Checkpoint) -> str:
    """What the folder asks for, else sigmoid; LoadError for what is neither that nor nothing."""
    stated = (checkpoint.config.get("sentence_transformers") or {}).get("activation_fn")
    stated = stated or checkpoint.config.get("sbert_ce_default_activation_function") or "Sigmoid"
    kind = _ACTIVATIONS.get(str(stated).rsplit(".", 1)[-1])
    if kind is None:
        raise LoadError(f"{checkpoint.folder / 'config.json'} scores by {stated}, which is not supported")
    return kind
