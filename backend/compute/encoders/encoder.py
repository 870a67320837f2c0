"""Encoder: a rank's worker for tasks over text: micro-batches in, a row a sequence out. It knows no requests."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backend.compute import onednn
from backend.compute.all_reduce import agree
from backend.compute.decoder import dtype_of
from backend.compute.encoders.attention import packable
from backend.compute.encoders.buckets import usual
from backend.compute.encoders.graphs import Capture
from backend.compute.encoders.inputs import Inputs
from backend.compute.encoders.load import load_encoder
from backend.compute.encoders.packing import Packing
from backend.compute.offload.offload import Offload
from backend.compute.proof import PARTS, allow, distance, plain_modules
from backend.compute.quantized import trial
from backend.compute.quantized.scheme import scheme_of
from backend.compute.room import Room
from backend.compute.tensor_parallel import join
from backend.compute.upload import download
from backend.encoders import longest
from backend.errors import ServingError, one_line
from backend.model_folder import Checkpoint, resolve
from backend.ranks.rank import Birth, Deferred
from backend.tasks import find
from backend.tasks.text import Piece, Ready, Texts

Arrays = NDArray[Any] | list[NDArray[Any] | ServingError]
"""One a sequence."""

CALLS = 2
"""Of one size until its graph is there."""


class Encoder:
    """One rank's shard of an encoder and its head. Every rank gets every micro-batch, in order."""

    def __init__(self, birth: Birth, progress: Callable[[str], None]) -> None:
        logging.getLogger("transformers").setLevel(logging.ERROR)
        config = birth.config
        self._config, self._task, self._progress = config, find(birth.task), progress
        self._checkpoint = Checkpoint.open(resolve(config.model, None))
        self._most = min(longest(self._checkpoint, config.max_model_len), config.step_tokens)
        dtype = dtype_of(config, self._checkpoint)
        self._device, self._world = join(birth, progress), birth.world
        self._room = Room(self._device, birth.world)
        scheme = scheme_of(config)
        offload = Offload.of(config, birth.world, self._device)
        self._model = load_encoder(self._checkpoint, self._task.auto, birth.world, self._device, dtype, scheme, offload)
        if offload:
            progress(offload.told)
        elif self._device.type == "cuda":
            trial.tried(trial.multiplied(self._model))
        self._model.config.use_cache = False  # decoders that embed would keep keys and values
        self._types, self._padding = self._kinds(), int(getattr(self._model.config, "pad_token_id", None) or 0)
        self._packing: Packing | None = None
        if offload:
            offload.prove(lambda: self._hidden(self._trial()))
        if self._packs(dtype):
            self._pack()
            self._graph(birth.world)
        self._onednn = not self._packing and config.fused_kernels and onednn.pays(self._device, dtype)
        if self._onednn:
            progress(f"{onednn.install(self._model)} linear layers by oneDNN")

    def _packs(self, dtype: torch.dtype) -> bool:
        """Not with offload: packing calls the layers' code past the hooks that wait for their weights."""
        wanted = self._device.type == "cuda" and self._config.fused_kernels and not self._config.offload
        return wanted and packable(type(self._model), self._model.config, dtype)

    def _pack(self) -> None:
        """Compute without padding, once a trial has shown that the result stays."""
        trial = self._trial()
        with plain_modules(self._model):
            self._plain = self._hidden(trial)
        self._packing = Packing(self._model)
        if reason := self._differs(lambda: self._hidden(trial), self._plain):
            self._packing.remove()
            self._packing = None
        self._progress(
            f"texts are padded, since packing them fails: {reason}" if reason else "texts are packed without padding"
        )

    def _graph(self, world: int) -> None:
        """Replay the layers as CUDA graphs, once a trial has shown that a graph takes in what is new in a batch."""
        if not self._packing or not self._config.cuda_graphs:
            return
        first, second = self._trial(), self._trial(turned=True)
        before = self._hidden(second)
        graphs = self._packing.graph(self._config.step_tokens, Capture(), partial(agree, world, self._device))
        reason = self._differs(lambda: [self._hidden(each) for each in (first, first, second)][-1], before)
        reason = reason or graphs.failed or ("" if graphs.count else "nothing was captured")
        if not agree(world, self._device, not reason):
            self._packing.graphs = None
            reason = reason or "another rank's do"
        self._progress(
            f"layers run without CUDA graphs, since those fail: {reason}" if reason else "layers run as CUDA graphs"
        )

    def _differs(self, compute: Callable[[], Tensor], before: Tensor) -> str:
        """Why the result is not what it was before, if so."""
        try:
            found = distance(compute(), before)
        except (RuntimeError, TypeError) as error:
            return one_line(error)
        return "" if found < PARTS else f"the result differs by {found:.3g}"

    def _prove(self) -> float:
        """How far a trial's result is from the plain one by now, with every graph there; LoadError where too far."""
        if not self._packing and not self._onednn:
            return 0.0
        trial, packing = self._trial(), self._packing
        graphs = packing.graphs if packing else None
        if packing:
            packing.graphs = None
        else:
            with plain_modules(self._model):
                self._plain = self._hidden(trial)
        found = self._allowed("fused_kernels", trial)
        if packing and graphs:
            packing.graphs = graphs
            found = self._allowed("cuda_graphs", trial)
        self._progress(f"output proof: within {found:.2g} of the largest value of the plain computation's")
        return found

    def _allowed(self, parameter: str, trial: Texts) -> float:
        found = distance(self._hidden(trial), self._plain)
        return allow(parameter, found, PARTS, "the model's output", "its largest value")

    def _trial(self, turned: bool = False) -> Texts:
        """Texts of several lengths; turned, others of the same size."""
        lengths = [length for length in (37, 3, 128, 1, 64) if length <= self._most][:: -1 if turned else 1]
        high = int(self._checkpoint.vocab_size or 1000)
        ids = (np.arange(sum(lengths)) * (104729 if turned else 7919) % max(2, high - 1) + 1).astype(np.int32)
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

    @torch.inference_mode()
    def warm_up(self) -> Ready:
        """The largest micro-batches, of longest texts and of short ones, the usual ones' graphs, the output proof."""
        most, tokens = self._most, self._config.step_tokens
        for length in {most: None, min(64, most): None, min(16, most): None}:
            count = max(1, tokens // length)
            taken = self._room.peak(partial(self._warm, length, count)) / (length * count)
            self._room.per_token = max(self._room.per_token, taken)
        if self._packing and self._packing.graphs:
            buckets = usual(tokens, most)
            self._progress(f"capturing {len(buckets)} CUDA graphs of the layers")
            self._packing.graphs.prepare(buckets)
        graphed = tokens if self._packing and self._packing.graphs else 0
        return Ready(self._prove(), packed=self._packing is not None, graphed=graphed)

    def _warm(self, length: int, count: int) -> None:
        ids = np.full(length, 1, np.int32)
        piece = Piece(ids, np.zeros(length, np.int32), self._task.warm)
        for _ in range(CALLS if self._packing and self._packing.graphs else 1):
            answer = self._whole(Texts.of([piece] * count))
            if callable(answer):
                answer()

    @torch.inference_mode()
    def forward(self, batch: Texts) -> Arrays | Deferred:
        """A row a sequence; where there is no device memory for all at once, of halves, an error for one too long."""
        if (found := self._tried(batch)) is not None:
            return found
        if len(batch.lengths) > 1:
            first, second = (self.forward(half) for half in batch.halves())
            return joined(first, second)
        long = f"no device memory for a text of {batch.lengths[0]} tokens"
        return [ServingError(f"{long}; shorten it, or load the model with a smaller max_model_len or step_tokens")]

    def _tried(self, batch: Texts) -> Arrays | Deferred | None:
        """Nothing where there is no device memory: several ranks must know before they begin, see `room`."""
        if self._world > 1:
            padded = len(batch.lengths) * int(batch.lengths.max())
            return self._whole(batch) if self._room.fits(self._room.bytes(padded, 0)) else None
        try:
            return self._whole(batch)
        except torch.OutOfMemoryError:
            return None

    @torch.inference_mode()
    def _whole(self, batch: Texts) -> Arrays | Deferred:
        """Run the model and the task's device half: a row a sequence, whatever that half makes of it."""
        output, mask = self._compute(batch)
        return self._answer(self._task.forward(output, batch, mask))

    def _compute(self, batch: Texts) -> tuple[Any, Tensor]:
        """The model's own output, and which tokens are there [n, longest]."""
        graphs = bool(self._packing and self._packing.graphs)
        inputs = Inputs.of(batch, self._padding, self._types, self._device, graphs)
        if self._packing:
            self._packing.enter(inputs.layout)
        more = {"token_type_ids": inputs.types} if self._types else {}
        return self._model(input_ids=inputs.ids, attention_mask=inputs.mask, **more), inputs.mask

    def _answer(self, values: Tensor) -> Arrays | Deferred:
        """The rows, once they have been copied; as one array, which crosses to the stub much faster.  # [n, ...]"""
        if self._device.type != "cuda":
            return values.numpy()
        arrived = download(values)

        def rows() -> Arrays:
            return arrived()[0].numpy()

        return rows


def joined(first: Arrays | Deferred, second: Arrays | Deferred) -> Arrays | Deferred:
    """The rows of both; padded by different lengths, each stays an array of its own."""
    if not callable(first) and not callable(second):
        return [*first, *second]
    return lambda: [row for part in (first, second) for row in (part() if callable(part) else part)]
