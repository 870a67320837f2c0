"""embed: texts in, vectors out. Sentence-transformers' folders say how to pool and normalise, and name prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tokenizers import normalizers

from backend.config import EngineConfig
from backend.errors import InvalidInput, ServingError
from backend.tasks.sentence_folder import Pooling, pooling_of
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
        if not config.max_model_len:
            self.longest = min(self.longest, self.pooling.max_seq_length or self.longest)
        self._lower = normalizers.Lowercase()
        self._prompt_tokens = lru_cache(maxsize=256)(self._count_prompt)

    def parse(self, row: Row) -> Item:
        pooling = decode(row["pooling"], "pooling") if "pooling" in row else self.pooling.kind
        if pooling not in POOLINGS:
            raise InvalidInput(f"pooling must be one of {', '.join(POOLINGS)}, not {pooling!r:.80}")
        most = self.pooling.dimensions
        return Item(
            text_of(row, "text", self.config.max_prompt_bytes),
            bool(row.get("normalize", self.pooling.normalize)),
            bool(row.get("truncate", True)),
            number(row, "dimensions", self.pooling.stated_dimensions or most, 1, most),
            pooling,
            self.prompt(text_of(row, "prompt", self.config.max_prompt_bytes) if "prompt" in row else None),
        )

    def prompt(self, given: str | None) -> str:
        """A prompt by its name in the model's configuration, or a text as it is; without one the model's default."""
        return self.pooling.prompts.get(given, given) if given is not None else self.pooling.default_prompt

    def prepare(self, items: Sequence[Item]) -> list[list[Piece] | ServingError]:
        texts = [self._cased(item.prompt + item.text) for item in items]
        found = self.encode_truncated(texts, [item.truncate for item in items])
        return [
            each if isinstance(each, ServingError) else [self.piece(each, self._options(item))]
            for item, each in zip(items, found, strict=True)
        ]

    def _options(self, item: Item) -> dict[str, Any]:
        skipped = 0 if self.pooling.include_prompt or not item.prompt else self._prompt_tokens(item.prompt)
        return {"pooling": item.pooling} | ({"skip": skipped} if skipped else {})

    def _count_prompt(self, prompt: str) -> int:
        """Tokens of a prompt as sentence-transformers counts them: those that open a text, not the one that ends it."""
        encoding = self.encode([self._cased(prompt)])[0]
        return len(encoding.ids) - int(encoding.special_tokens_mask[-1:] == [1])

    def _cased(self, text: str) -> str:
        return str(self._lower.normalize_str(text)) if self.pooling.lower else text

    @staticmethod
    def forward(output: Any, batch: Texts, mask: Any) -> Any:
        """On a device: pool.  # hidden [n, longest, hidden], mask [n, longest] -> [n, hidden]"""
        hidden = output.last_hidden_state.float()
        kinds = [options["pooling"] for options in batch.options]
        pooled = without_prompts(mask, [options.get("skip", 0) for options in batch.options])
        if len({*kinds}) == 1:
            return pool(hidden, pooled, kinds[0])
        vectors = hidden.new_empty(hidden.shape[0], hidden.shape[-1])
        for kind in {*kinds}:
            rows = mask.new_tensor([at for at, own in enumerate(kinds) if own == kind])
            vectors[rows] = pool(hidden[rows], pooled[rows], kind)
        return vectors

    def finish(self, item: Item, pieces: Sequence[Piece], answers: Sequence[Array]) -> Embedding:
        vector = answers[0]
        for dense in self.pooling.dense:
            vector = dense(vector)
        vector = vector[: item.dimensions]
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
    places = mask.argmax(1) if kind == "cls" else mask.shape[1] - 1 - mask.flip(1).argmax(1)  # first or last of them
    return hidden.gather(1, places[:, None, None].expand(-1, 1, hidden.shape[-1]))[:, 0]


def without_prompts(mask: Any, tokens: Sequence[int]) -> Any:
    """The mask without the first tokens of each text, all but its last at most.  # [n, longest]"""
    if not any(tokens):
        return mask
    skipped = mask.new_tensor(tokens).minimum(mask.sum(1) - 1)
    return mask * (mask.cumsum(1) > skipped[:, None])
