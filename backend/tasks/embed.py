"""embed: texts in, vectors out. Sentence-transformers' folders say how to pool, what to normalise and which prompts exist."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from backend.config import EngineConfig
from backend.encoders import Pooling, pooling_of
from backend.errors import InvalidInput, ServingError
from backend.tasks.task import Array, Row, decode, number, text_of
from backend.tasks.text import Piece, Texts, TextTask

POOLINGS = ("mean", "cls", "last", "max")


@dataclass(frozen=True)
class Item:
    text: str
    normalize: bool
    truncate: bool
    dimensions: int
    pooling: str
    prompt: str
    """Put before the text."""


@dataclass(frozen=True)
class Embedding:
    vector: Array  # [dimensions]
    num_tokens: int


class Embed(TextTask):
    """Vectors of texts."""

    auto: ClassVar[str] = "AutoModel"
    warm: ClassVar[dict[str, Any]] = {"pooling": "mean"}

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        super().__init__(folder, config)
        self.pooling: Pooling = pooling_of(folder, self.checkpoint)
        self.longest = min(self.longest, self.pooling.max_seq_length or self.longest)

    def parse(self, row: Row) -> Item:
        pooling = decode(row["pooling"], "pooling") if "pooling" in row else self.pooling.kind
        if pooling not in POOLINGS:
            raise InvalidInput(f"pooling must be one of {', '.join(POOLINGS)}, not {pooling!r:.80}")
        return Item(
            text_of(row, "text"),
            bool(row.get("normalize", self.pooling.normalize)),
            bool(row.get("truncate", True)),
            number(row, "dimensions", self.pooling.dimensions, 1, self.pooling.dimensions),
            pooling,
            self.prompt(decode(row["prompt"], "prompt") if "prompt" in row else None),
        )

    def prompt(self, given: str | None) -> str:
        """A prompt by its name in the model's configuration, or a text as it is; without one the model's default."""
        return self.pooling.prompts.get(given, given) if given is not None else self.pooling.default_prompt

    def prepare(self, items: Sequence[Item]) -> list[list[Piece] | ServingError]:
        texts = [item.prompt + item.text for item in items]
        found = self.encode_truncated(texts, [item.truncate for item in items])
        return [
            each if isinstance(each, ServingError) else [self.piece(each, {"pooling": item.pooling})]
            for item, each in zip(items, found, strict=True)
        ]

    @staticmethod
    def forward(output: Any, batch: Texts, mask: Any) -> Any:
        """On a device: pool.  # hidden [n, longest, hidden], mask [n, longest] -> [n, hidden]"""
        hidden = output.last_hidden_state.float()
        kinds = [options["pooling"] for options in batch.options]
        vectors = hidden[:, 0].clone()  # cls
        for kind in {*kinds} - {"cls"}:
            rows = hidden.new_tensor([at for at, own in enumerate(kinds) if own == kind], dtype=mask.dtype)
            vectors[rows] = pool(hidden[rows], mask[rows], kind)
        return vectors

    def finish(self, item: Item, pieces: Sequence[Piece], answers: Sequence[Array]) -> Embedding:
        vector = answers[0][: item.dimensions]
        norm = float(np.linalg.norm(vector)) if item.normalize else 1.0
        return Embedding(vector / np.float32(max(norm, 1e-12)), len(pieces[0].ids))

    def outputs(self, results: Sequence[Embedding]) -> dict[str, Array]:
        if len({len(result.vector) for result in results}) > 1:
            raise InvalidInput("dimensions must be the same in all rows of one request")
        return {
            "embedding": np.stack([result.vector for result in results]),
            "num_tokens": np.array([[result.num_tokens] for result in results], np.int32),
        }


def pool(hidden: Any, mask: Any, kind: str) -> Any:
    """As sentence-transformers does.  # [n, longest, hidden], [n, longest] -> [n, hidden]"""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    if kind == "mean":
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    if kind == "max":
        return hidden.masked_fill(weights == 0, float("-inf")).amax(1)
    last = (mask.sum(1) - 1).clamp(min=0)  # texts are padded at their end
    return hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[-1]))[:, 0]
