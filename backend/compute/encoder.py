"""Encoder: a rank's worker for tasks over text: micro-batches in, one array a sequence out. It knows no requests."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backend.checkpoint import Checkpoint, resolve
from backend.compute.decoder import dtype_of
from backend.compute.load_encoder import load_encoder
from backend.compute.packing import Packing, packable
from backend.compute.tensor_parallel import join
from backend.compute.upload import download, upload
from backend.encoders import longest
from backend.ranks.rank import Birth, Deferred
from backend.tasks import find
from backend.tasks.text import Piece, Texts

Arrays = list[NDArray[Any]]

TOLERANCE = 0.05
"""Packed against padded in half precision, relative to the largest value; a wrong mask shows as far more."""


class Encoder:
    """One rank's shard of an encoder and its head. Every rank gets every micro-batch, in order."""

    def __init__(self, birth: Birth, progress: Callable[[str], None]) -> None:
        logging.getLogger("transformers").setLevel(logging.ERROR)
        config = birth.config
        self._config, self._task, self._progress = config, find(birth.task), progress
        self._checkpoint = Checkpoint.open(resolve(config.model, None))
        self._most = min(longest(self._checkpoint, config.max_model_len), config.step_tokens)
        dtype = dtype_of(config, self._checkpoint)
        self._device = join(birth, progress)
        self._model = load_encoder(self._checkpoint, self._task.auto, birth.world, self._device, dtype)
        self._model.config.use_cache = False  # decoders that embed would keep keys and values
        self._types = self._kinds()
        self._packing: Packing | None = None
        if self._device.type == "cuda" and packable(type(self._model), self._model.config, dtype):
            self._pack()

    def _pack(self) -> None:
        """Compute without padding, once a trial has shown that the result stays."""
        trial = self._trial()
        before, usual = self._hidden(trial), self._model.config._attn_implementation
        self._packing = Packing(self._model)
        try:
            difference = float((self._hidden(trial) - before).abs().max() / before.abs().max().clamp(min=1e-6))
            reason = "" if difference < TOLERANCE else f"its result differs by {difference:.3g}"
        except (RuntimeError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
        if reason:
            self._packing.remove()
            self._packing = None
            self._model.set_attn_implementation(usual)
        self._progress(
            f"texts are padded, since packing them fails: {reason}" if reason else "texts are packed without padding"
        )

    def _trial(self) -> Texts:
        """Texts of several lengths."""
        lengths = [length for length in (37, 3, 128, 1, 64) if length <= self._most]
        high = int(self._checkpoint.vocab_size or 1000)
        ids = (np.arange(sum(lengths)) * 7919 % max(2, high - 1) + 1).astype(np.int32)
        return Texts(ids, np.zeros_like(ids), np.array(lengths, np.int64), [self._task.warm] * len(lengths))

    @torch.inference_mode()
    def _hidden(self, batch: Texts) -> Tensor:
        """What the model makes of a batch, zero where there is padding.  # [n, ...]"""
        output, mask = self._compute(batch)
        first: Tensor = output[0].float()
        return first * mask[..., None] if first.shape[:2] == mask.shape and first.dim() > 2 else first

    def _kinds(self) -> int:
        """How many kinds of tokens the model tells apart; 0: it does not ask."""
        named = self._model.named_modules()
        tables = [module for name, module in named if name.endswith("token_type_embeddings")]
        return int(tables[0].weight.shape[0]) if tables else 0

    def warm_up(self) -> None:
        """The largest micro-batches: one of longest texts, one of many short ones."""
        most = self._most
        for length in {most, min(16, most)}:
            ids = np.full(length, 1, np.int32)
            piece = Piece(ids, np.zeros(length, np.int32), self._task.warm)
            answer = self.forward(Texts.of([piece] * max(1, self._config.step_tokens // length)))
            if callable(answer):
                answer()

    @torch.inference_mode()
    def forward(self, batch: Texts) -> Arrays | Deferred:
        """Run the model and the task's device half: one array a sequence, whatever that half makes of it."""
        output, mask = self._compute(batch)
        return self._answer(self._task.forward(output, batch, mask))

    def _compute(self, batch: Texts) -> tuple[Any, Tensor]:
        """The model's own output, and which tokens are there [n, longest]."""
        mask = _mask(batch.lengths)  # [n, longest]
        inputs = {"input_ids": _padded(batch.input_ids, mask, self._padding())}
        if self._types:  # roberta knows one kind, whatever its tokenizer says of pairs
            inputs["token_type_ids"] = _padded(np.minimum(batch.type_ids, self._types - 1), mask, 0)
        here = {name: upload(values, self._device) for name, values in inputs.items()}
        attention = upload(mask.astype(np.int64), self._device)
        if self._packing:
            starts = np.concatenate([[0], np.cumsum(batch.lengths)]).astype(np.int32)
            places = upload(np.flatnonzero(mask), self._device)
            rows, width = mask.shape
            self._packing.enter((rows, width), places, upload(starts, self._device))
        return self._model(**here, attention_mask=attention), attention

    def _padding(self) -> int:
        return int(getattr(self._model.config, "pad_token_id", None) or 0)

    def _answer(self, values: Tensor) -> Arrays | Deferred:
        """The rows, once they have been copied.  # [n, ...]"""
        if self._device.type != "cuda":
            return list(values.numpy())
        arrived = download(values)
        return lambda: list(arrived()[0].numpy())


def _mask(lengths: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.arange(lengths.max()) < lengths[:, None]


def _padded(flat: NDArray[np.int32], mask: NDArray[np.bool_], fill: int) -> NDArray[np.int64]:
    padded = np.full(mask.shape, fill, np.int64)
    padded[mask] = flat
    return padded
