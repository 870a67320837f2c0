"""Sampler: logits to token ids, every row by its own settings. It does not know sequences, only rows and slots."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backend.compute.sampling.noise import bits, gumbel, row_keys
from backend.compute.sampling.parameters import parameters
from backend.compute.upload import upload
from backend.generation.plan import History, Longs, Sampling

__all__ = ["BROKEN", "Sampler", "bits", "gumbel", "row_keys"]

BROKEN = -1
"""The id answered for a row whose logits hold NaN or +inf, or in which nothing is left to choose."""

Draw = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Logits [S, V], parameters int32 [S, WORDS], log-probabilities to fill -> ids [S]; see sampling/draw.py."""

_SMALLEST = float(np.finfo(np.float32).tiny)


class Sampler:
    """Chooses the next token of each row; owns the token counts of the slots.

    Order, after transformers' generate: blocked ids, repetition penalty over prompt and completion (Keskar et al.
    2019, arXiv:1909.05858), frequency and presence penalty over the completion (OpenAI's formula), temperature,
    top_k, top_p (Holtzman et al. 2019, arXiv:1904.09751) of what top_k left, min_p (Nguyen et al. 2024,
    arXiv:2407.01082). Tokens as likely as the last one kept are kept too. Ties in the choice go to the lowest id.
    Nothing waits for the device: what to compute is decided from the numpy arrays of `Sampling`. On CUDA draws come
    from the kernels that CUDA graphs may hold too, so that both choose the same tokens. CPU and CUDA round differently:
    where less than about 1e-6 decides whether a token is kept or drawn, they may choose differently.
    """

    def __init__(self, vocab_size: int, max_sequences: int, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._counts = _Counts(vocab_size, max_sequences, self.device)
        self._ids = torch.arange(vocab_size, dtype=torch.int32, device=self.device)
        self._kernels: Draw | None = None
        if self.device.type == "cuda":
            self._kernels = import_module("backend.compute.sampling.draw").draw  # needs OpenAI Triton

    def sample(
        self, logits: Tensor, sampling: Sampling, slots: NDArray[np.int32] | Tensor, histories: Iterable[History] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [R, V] of any float type, slots [R] -> ids int64 [R] and, if asked for, their log-probabilities [R].

        Log-probabilities are of the model's own distribution, before penalties and temperature. An id is BROKEN
        where there is no right one; the caller raises when it reads the ids.
        """
        for history in histories:
            self._counts.restart(history)
        scores = self._adjusted(logits, sampling, slots)
        logprobs: Tensor | None = None
        if self._kernels is not None and not sampling.greedy:
            if sampling.logprobs and scores is logits:
                logprobs = torch.empty(len(logits), device=self.device)
            token_ids = self._kernels(scores, self._upload(parameters(sampling)), logprobs)
        else:
            token_ids = self._chosen(scores, sampling)
        if sampling.penalised:
            self._counts.add(self._slots(slots), token_ids.clamp(min=0))
        if sampling.logprobs and logprobs is None:
            logprobs = _logprobs(logits, token_ids.clamp(min=0))
        return token_ids, logprobs

    def draw(self, logits: Tensor, words: Tensor) -> Tensor:
        """Logits [R, V] and words [R, WORDS] of sampling.parameters -> ids int64 [R], by the kernels of CUDA alone."""
        assert self._kernels is not None
        return self._kernels(logits, words, None)

    def _chosen(self, scores: Tensor, sampling: Sampling) -> Tensor:
        """Ids [R], BROKEN among them, by torch's operations."""
        best, token_ids = scores.max(dim=-1)
        if not sampling.greedy:
            drawn = np.flatnonzero(sampling.temperature)
            token_ids = self._on_rows(
                drawn, lambda ids, scores, best: self._drawn(scores, best, sampling, drawn), token_ids, scores, best
            )
        return token_ids.masked_fill_(~best.isfinite(), BROKEN)

    def _adjusted(self, logits: Tensor, sampling: Sampling, slots: NDArray[np.int32] | Tensor) -> Tensor:
        """Logits less blocked ids and with penalties; the logits themselves are left as they are."""
        blocked = sampling.blocked[sampling.blocked[:, 1] < logits.shape[-1]]  # others cannot be chosen anyway
        if not sampling.penalised and not len(blocked):
            return logits
        scores = logits.to(torch.float32, copy=True)  # [R, V]
        if len(blocked):
            rows, ids = self._upload(blocked.T)
            scores.index_put_((rows, ids), scores.new_full((), -torch.inf))  # a Python number would be waited for
        if not sampling.penalised:
            return scores
        settings = np.stack([sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty])
        penalised = np.flatnonzero((settings != [[1], [0], [0]]).any(axis=0))
        on_device = self._upload(settings[:, penalised, None])  # [3, P, 1]
        return self._on_rows(
            penalised, lambda part, at: _penalised(part, *self._counts.of(at), on_device), scores, self._slots(slots)
        )

    def _drawn(self, scores: Tensor, best: Tensor, sampling: Sampling, rows: Longs) -> Tensor:
        """One id per row [G], drawn from scores [G, V] whose greatest is best [G].

        Relative to the best, so that a tiny temperature gives no overflow. The Gumbel-max trick turns a draw into
        an argmax, and its noise depends on nothing but seed, counter and token id.
        """
        temperature = np.maximum(sampling.temperature[rows, None], _SMALLEST)
        scores = (scores.float() - best[:, None].float()) / self._upload(temperature)
        scores = self._filtered(scores, sampling.top_k[rows], sampling.top_p[rows], sampling.min_p[rows])
        keys = self._upload(row_keys(sampling.seeds[rows], sampling.counters[rows])[:, :, None])
        return (scores + gumbel(keys[0], keys[1], self._ids)).argmax(dim=-1)

    def _filtered(
        self, scores: Tensor, top_k: NDArray[np.int32], top_p: NDArray[np.float32], min_p: NDArray[np.float32]
    ) -> Tensor:
        """Scores [G, V] with -inf where top_k, top_p or min_p drop a token; the best of each row is 0 and stays."""
        k = np.minimum(top_k, scores.shape[-1]).astype(np.int64)
        if (rows := np.flatnonzero(k % scores.shape[-1])).size:
            scores = self._on_rows(
                rows, lambda part: _most_likely(part, self._upload(k[rows, None]), int(k[rows].max())), scores
            )
        if (rows := np.flatnonzero(top_p < 1)).size:
            widest = int(top_k[rows].max()) if top_k[rows].all() else scores.shape[-1]
            scores = self._on_rows(rows, lambda part: _nucleus(part, self._upload(top_p[rows, None]), widest), scores)
        if min_p.any():
            with np.errstate(divide="ignore"):  # the logarithm of 0 is -inf, which keeps all
                scores = scores.masked_fill(scores < self._upload(np.log(min_p[:, None])), -torch.inf)
        return scores

    def _on_rows(self, rows: Longs, change: Callable[..., Tensor], first: Tensor, *others: Tensor) -> Tensor:
        """The first tensor with some rows (all of them, often) replaced by what `change` makes of them."""
        if len(rows) == len(first):
            return change(first, *others)
        at = self._upload(rows)
        return first.index_copy(0, at, change(first[at], *(other[at] for other in others)))

    def _slots(self, slots: NDArray[np.int32] | Tensor) -> Tensor:
        return slots.to(self.device) if isinstance(slots, Tensor) else self._upload(slots.astype(np.int64))

    def _upload(self, array: NDArray[Any]) -> Tensor:
        return upload(array, self.device)


def _penalised(scores: Tensor, prompt: Tensor, counts: Tensor, settings: Tensor) -> Tensor:
    """Scores, occurrence in the prompt and counts in the completion [P, V], with settings [3, P, 1]."""
    repetition, frequency, presence = settings.unbind()
    repeated = torch.where(scores < 0, scores * repetition, scores / repetition)
    scores = torch.where(prompt | (counts > 0), repeated, scores)
    return scores - (frequency * counts + presence * (counts > 0))


def _most_likely(scores: Tensor, k: Tensor, largest: int) -> Tensor:
    """Scores [G, V] less those below the k-th [G, 1]."""
    last = scores.topk(largest).values.gather(1, k - 1)
    return scores.masked_fill(scores < last, -torch.inf)


def _nucleus(scores: Tensor, top_p: Tensor, widest: int) -> Tensor:
    """Scores [G, V] less those before which the more likely tokens reach top_p [G, 1].

    At most `widest` of a row are finite, but for ties of the last.
    """
    ordered = _descending(scores) if widest >= scores.shape[-1] else scores.topk(widest).values  # [G, widest]
    mass = (ordered - scores.logsumexp(dim=-1, keepdim=True)).exp().cumsum(dim=-1)
    kept = (mass[:, :-1] < top_p).sum(dim=-1, keepdim=True)  # [G, 1], less one: the first always stays
    return scores.masked_fill(scores < ordered.gather(1, kept), -torch.inf)


def _descending(scores: Tensor) -> Tensor:
    if scores.device.type == "cpu":  # numpy's sort is vectorised: 14 times faster here than torch's
        return torch.from_numpy(np.sort(scores.numpy(), axis=-1)).flip(-1)
    return scores.sort(dim=-1, descending=True).values


def _logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    logits = logits.float()
    return logits.gather(1, token_ids[:, None])[:, 0] - logits.logsumexp(dim=-1)


class _Counts:
    """How often each token occurs in each slot's sequence; nothing is allocated before the first penalised one."""

    def __init__(self, vocab_size: int, max_sequences: int, device: torch.device) -> None:
        self._shape, self._device = (max_sequences, vocab_size), device
        self._prompt: Tensor | None = None
        self._completion: Tensor | None = None

    @property
    def allocated(self) -> bool:
        return self._completion is not None

    def restart(self, history: History) -> None:
        """Count the tokens of the sequence that has just been given a slot."""
        prompt, completion = self._tensors()
        prompt[history.slot] = False
        prompt[history.slot].index_fill_(0, upload(history.prompt.astype(np.int64), self._device), True)
        completion[history.slot] = 0
        known = upload(history.completion.astype(np.int64), self._device)
        completion[history.slot].index_add_(0, known, torch.ones_like(known, dtype=torch.int32))

    def of(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Whether in the prompt, bool, and how often in the completion, int32: both [P, V]."""
        prompt, completion = self._tensors()
        return prompt[slots], completion[slots]

    def add(self, slots: Tensor, token_ids: Tensor) -> None:
        """One more token for each slot [R]; those of sequences without penalties are counted too, and never read."""
        _, completion = self._tensors()
        completion[slots, token_ids] += 1

    def _tensors(self) -> tuple[Tensor, Tensor]:
        if self._prompt is None or self._completion is None:
            self._prompt = torch.zeros(self._shape, dtype=torch.bool, device=self._device)
            self._completion = torch.zeros(self._shape, dtype=torch.int32, device=self._device)
        return self._prompt, self._completion
