"""fill_mask: the likeliest tokens in place of a text's one mask, as transformers' fill-mask pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from backend.config import EngineConfig
from backend.errors import InvalidInput, LoadError, ServingError
from backend.tasks.task import Array, Row, filled, number, text_of, texts
from backend.tasks.text import Piece, Texts, TextTask

MOST = 1000
"""Tokens that one row may ask for."""


@dataclass(frozen=True)
class Item:
    text: str
    top_k: int
    truncate: bool


@dataclass(frozen=True)
class Filling:
    strings: list[str]
    scores: list[float]
    tokens: list[int]
    sequences: list[str]


class FillMask(TextTask):
    """Tokens for masks."""

    auto: ClassVar[str] = "AutoModelForMaskedLM"
    warm: ClassVar[dict[str, Any]] = {"place": 0, "top_k": 5}

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        super().__init__(folder, config)
        self.mask = self.tokenizer.special_tokens.get("mask_token", "")
        mask_id = self.tokenizer.token_id(self.mask) if self.mask else None
        if mask_id is None:
            raise LoadError(f"the tokenizer in {folder} has no mask token: not a model that fills masks")
        self.mask_id = mask_id
        self.pad_id = self.tokenizer.token_id(self.tokenizer.special_tokens.get("pad_token", ""))
        self.most = min(MOST, self.checkpoint.vocab_size or MOST)

    def parse(self, row: Row) -> Item:
        top_k = number(row, "top_k", min(5, self.most), 1, self.most)
        return Item(text_of(row, "text", self.config.max_prompt_bytes), top_k, bool(row.get("truncate", False)))

    def prepare(self, items: Sequence[Item]) -> list[list[Piece] | ServingError]:
        found = self.encode_truncated([item.text for item in items], [item.truncate for item in items])
        return [
            each if isinstance(each, ServingError) else self._pieces(item, each)
            for item, each in zip(items, found, strict=True)
        ]

    def _pieces(self, item: Item, encoding: Any) -> list[Piece] | ServingError:
        places = [at for at, token in enumerate(encoding.ids) if token == self.mask_id]
        if len(places) == 1:
            return [self.piece(encoding, {"place": places[0], "top_k": item.top_k})]
        if places:
            return InvalidInput(f"text has {len(places)} mask tokens {self.mask}: send one a text")
        if self.mask in item.text:
            return InvalidInput(f"text has its mask token {self.mask} behind the {self.longest} tokens of the model")
        return InvalidInput(f"text has no mask token: write {self.mask} where a word is wanted")

    @staticmethod
    def forward(output: Any, batch: Texts, mask: Any) -> Any:
        """On a device: only the masks' best.  # logits [n, longest, vocab] -> scores and token ids [n, 2, top]"""
        logits, places = output.logits, [options["place"] for options in batch.options]
        top = min(max(options["top_k"] for options in batch.options), logits.shape[-1])
        best = logits[list(range(len(places))), places].float().softmax(-1).topk(top)
        both = best.values.new_empty(len(places), 2, top)
        both[:, 0], both[:, 1] = best.values, best.indices  # ids are exact up to 2**24
        return both

    def finish(self, item: Item, pieces: Sequence[Piece], answers: Sequence[Array]) -> Filling:
        values, tokens = answers[0][0][: item.top_k], answers[0][1][: item.top_k].astype(np.int32).tolist()
        return Filling(
            [self.tokenizer.decode([token], skip_special_tokens=False) for token in tokens],
            values.tolist(),
            tokens,
            [self._sequence(pieces[0], token) for token in tokens],
        )

    def _sequence(self, piece: Piece, token: int) -> str:
        """The text with this token; special tokens are left out, a padding token too that was written in the text."""
        ids = piece.ids.copy()
        ids[piece.options["place"]] = token
        return self.tokenizer.decode([each for each in ids.tolist() if each != self.pad_id])

    def outputs(self, results: Sequence[Filling]) -> dict[str, Array]:
        return {
            "token_str": texts([result.strings for result in results]),
            "score": filled([result.scores for result in results], 0.0, np.float32),
            "token": filled([result.tokens for result in results], -1, np.int32),
            "sequence": texts([result.sequences for result in results]),
        }
