"""Encoder: a rank's worker for tasks over text; micro-batches in, one array a sequence out. It does not know requests."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backend.checkpoint import Checkpoint, resolve
from backend.compute.decoder import BUILDS, dtype_of
from backend.compute.load_encoder import check_split, load_encoder
from backend.compute.tensor_parallel import connect
from backend.compute.upload import upload
from backend.encoders import longest
from backend.ranks.rank import Birth, Deferred
from backend.tasks import find
from backend.tasks.text import Piece, Texts

Arrays = list[NDArray[Any]]


class Encoder:
    """One rank's shard of an encoder and its head. Every rank gets every micro-batch, in order."""

    def __init__(self, birth: Birth, progress: Callable[[str], None]) -> None:
        logging.getLogger("transformers").setLevel(logging.ERROR)
        config = birth.config
        self._config, self._task, self._progress = config, find(birth.task), progress
        self._device = torch.device(f"cuda:{birth.rank}" if config.device == "cuda" else "cpu")
        self._checkpoint = Checkpoint.open(resolve(config.model, None))
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        else:
            torch.set_num_threads(config.threads)
        if birth.world > 1:
            progress(f"joining {birth.world} ranks" + (BUILDS if self._device.type == "cpu" else ""))
        connect(birth.rank, birth.world, self._device, Path(birth.folder))
        dtype = dtype_of(config, self._checkpoint)
        self._model = load_encoder(self._checkpoint, self._task.auto, birth.world, self._device, dtype)
        check_split(self._model, birth.world)
        self._typed = self._takes_types()

    def _takes_types(self) -> bool:
        embeddings = dict(self._model.named_modules())
        return any(name.endswith("token_type_embeddings") for name in embeddings)

    def warm_up(self) -> None:
        """The largest micro-batches: one of longest texts, one of many short ones."""
        most = min(longest(self._checkpoint, self._config.max_model_len), self._config.step_tokens)
        for length in {most, min(16, most)}:
            ids = np.full(length, 1, np.int32)
            piece = Piece(ids, np.zeros(length, np.int32), self._task.warm)
            answer = self.forward(Texts.of([piece] * max(1, self._config.step_tokens // length)))
            if callable(answer):
                answer()

    @torch.inference_mode()
    def forward(self, batch: Texts) -> Arrays | Deferred:
        """Run the model and the task's device half: one array a sequence, whatever that half makes of it."""
        mask = _mask(batch.lengths)  # [n, longest]
        inputs = {"input_ids": _padded(batch.input_ids, mask, self._pad())}
        if self._typed:
            inputs["token_type_ids"] = _padded(batch.type_ids, mask, 0)
        here = {name: upload(values, self._device) for name, values in inputs.items()}
        attention = upload(mask.astype(np.int64), self._device)
        output = self._model(**here, attention_mask=attention)
        return self._answer(self._task.forward(output, batch, attention))

    def _pad(self) -> int:
        return int(getattr(self._model.config, "pad_token_id", None) or 0)

    def _answer(self, values: Tensor) -> Arrays | Deferred:
        """The rows, once they have been copied.  # [n, ...]"""
        if self._device.type != "cuda":
            return list(values.numpy())
        host = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def answer() -> Arrays:
            copied.synchronize()
            return list(host.numpy())

        return answer


def _mask(lengths: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.arange(lengths.max()) < lengths[:, None]


def _padded(flat: NDArray[np.int32], mask: NDArray[np.bool_], fill: int) -> NDArray[np.int64]:
    padded = np.full(mask.shape, fill, np.int64)
    padded[mask] = flat
    return padded
