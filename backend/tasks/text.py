"""TextTask: what tasks over text share, tokenising and micro-batches under a token budget. It knows no heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from backend.config import EngineConfig
from backend.encoders import check_task, longest
from backend.errors import InvalidInput
from backend.generation.tokenizer import Tokenizer
from backend.model_folder import Checkpoint
from backend.tasks.task import Array

PADDED = {"cuda": 2}
"""How many times the token budget a micro-batch may have with padding; 1 elsewhere, where padding is computed."""


@dataclass(frozen=True)
class Piece:
    """One sequence as the model takes it."""

    ids: NDArray[np.int32]  # [tokens]
    type_ids: NDArray[np.int32]  # [tokens]
    options: dict[str, Any] = field(default_factory=dict)
    """For the task's device half, e.g. how to pool."""
    notes: Any = None
    """For the task's CPU half; stays in the stub."""


@dataclass(frozen=True)
class Texts:
    """A micro-batch: sequences end to end."""

    input_ids: NDArray[np.int32]  # [all tokens]
    type_ids: NDArray[np.int32]  # [all tokens]
    lengths: NDArray[np.int64]  # [sequences]
    options: list[dict[str, Any]]
    """One a sequence."""

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> Texts:
        return cls(
            np.concatenate([piece.ids for piece in pieces]),
            np.concatenate([piece.type_ids for piece in pieces]),
            np.array([len(piece.ids) for piece in pieces], np.int64),
            [piece.options for piece in pieces],
        )

    def halves(self) -> tuple[Texts, Texts]:
        """The first and the second half of at least two sequences."""
        count = len(self.lengths) // 2
        tokens = int(self.lengths[:count].sum())
        return (
            Texts(self.input_ids[:tokens], self.type_ids[:tokens], self.lengths[:count], self.options[:count]),
            Texts(self.input_ids[tokens:], self.type_ids[tokens:], self.lengths[count:], self.options[count:]),
        )


@dataclass(frozen=True)
class Ready:
    """What ranks of any task tell of themselves once they are ready."""

    proof: float = 0.0
    """How far what serves is from the plain computation; 0: that one serves."""
    packed: bool = False
    """Whether texts are computed without padding."""
    graphed: int = 0
    """Tokens of the largest packed micro-batch that is filled up to the size of a CUDA graph."""

    def computed(self, batch: Texts) -> int:
        """Tokens that the layers compute for it, padding and what fills a graph included."""
        if not self.packed:
            return len(batch.lengths) * int(batch.lengths.max())
        filled, tokens = stepped(len(batch.input_ids)), len(batch.input_ids)
        return filled if filled <= stepped(self.graphed) else tokens


_STEPS, _LEAST = 8, 128
"""Attention works in blocks of 128 tokens."""


def stepped(tokens: int) -> int:
    """What a graph's packed tokens are filled up to: the next of eight even steps between two powers of two."""
    step = max(_LEAST, (1 << max(0, tokens - 1).bit_length()) // 2 // _STEPS)
    return -(-tokens // step) * step


class TextTask:
    """Base of the text tasks. One thread parses and prepares, another one finishes."""

    worker: ClassVar[str] = "backend.compute.encoders.encoder:Encoder"
    auto: ClassVar[str]
    """transformers' class that loads the model."""
    warm: ClassVar[dict[str, Any]] = {}
    """A piece's options, for warm-up."""

    @staticmethod
    def forward(output: Any, batch: Texts, mask: Any) -> Any:
        """The device half, run in a rank: what is kept of the model's output.

        `output` is the model's (padded [n, longest, ...] or [n, ...]), `mask` [n, longest] int64; the result is a
        float32 or integer tensor [n, ...], of which `finish` gets each piece's row, padding included.
        """
        raise NotImplementedError

    def __init__(self, folder: Path, config: EngineConfig) -> None:
        self.config, self.checkpoint = config, Checkpoint.open(folder)
        check_task(self.checkpoint, config.tensor_parallel)
        self.tokenizer = Tokenizer.from_folder(folder)
        self.longest = longest(self.checkpoint, config.max_model_len)
        """Tokens of the longest sequence."""

    def encode(self, texts: Sequence[str | tuple[str, str]]) -> list[Any]:
        """`tokenizers.Encoding` of texts or pairs, whole, with special tokens and offsets in characters."""
        return self.tokenizer.encodings(texts)

    def fit(self, encoding: Any, truncate: bool) -> Any:
        """The encoding if it fits, nothing if it is to be cut; InvalidInput names both lengths where it may not be."""
        tokens = len(encoding)  # .ids would copy them
        if not tokens:
            raise InvalidInput("the text is empty: this model's tokenizer makes no tokens of it")
        if tokens <= self.longest:
            return encoding
        if not truncate:
            long = f"the text has {tokens} tokens, the model takes {self.longest}"
            raise InvalidInput(f"{long}; shorten it or ask to truncate")
        return None  # the caller encodes again with truncation

    def encode_truncated(self, texts: Sequence[str | tuple[str, str]], truncate: Sequence[bool]) -> list[Any]:
        """An encoding, or InvalidInput, for each text; too long ones are cut where they may be."""
        found: list[Any] = []
        for text, encoding, may in zip(texts, self.encode(texts), truncate, strict=True):
            try:
                found.append(self._known(self.fit(encoding, may) or self.tokenizer.truncated(text, self.longest)))
            except InvalidInput as error:
                found.append(error)
        return found

    def _known(self, encoding: Any) -> Any:
        """The encoding; InvalidInput for a token that the model has no embedding of, which would end the ranks."""
        most = self.checkpoint.vocab_size
        if self.tokenizer.vocab_size > most > 0 and max(encoding.ids) >= most:
            raise InvalidInput(f"the text has the token {max(encoding.ids)}, the model knows {most} tokens")
        return encoding

    @staticmethod
    def piece(encoding: Any, options: dict[str, Any] | None = None, notes: Any = None) -> Piece:
        ids, types = np.array(encoding.ids, np.int32), np.array(encoding.type_ids, np.int32)
        return Piece(ids, types, options or {}, notes)

    def cut(self, pieces: Sequence[Piece]) -> list[list[int]]:
        """By length, longest first, so that little is padded; each within the token budget, or one sequence."""
        order = sorted(range(len(pieces)), key=lambda index: -len(pieces[index].ids))
        batches: list[list[int]] = []
        longest = tokens = 0
        for index in order:
            own = len(pieces[index].ids)
            if batches and self._fits(tokens + own, longest * (len(batches[-1]) + 1)):
                batches[-1].append(index)
                tokens += own
            else:
                batches.append([index])
                longest = tokens = own
        return batches

    def _fits(self, tokens: int, padded: int) -> bool:
        """On a GPU layers are packed where they can be; padding then costs memory around them, for a moment."""
        budget = self.config.step_tokens
        return tokens <= budget and padded <= PADDED.get(self.config.device, 1) * budget

    def batch(self, pieces: Sequence[Piece]) -> Texts:
        return Texts.of(pieces)

    def join(self, answers: list[Any]) -> list[Array]:
        """Every rank has the whole answer."""
        first: list[Array] = answers[0]
        return first
