"""A micro-batch's numbers on their way to the device in one copy; it does not know what the model makes of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backend.compute.encoders.buckets import Bucket
from backend.compute.encoders.packing import Layout
from backend.tasks.text import Texts


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """On the device, padded [rows, longest]."""

    ids: Tensor
    mask: Tensor
    """One where there is a token; int64, as models and tasks take it."""
    types: Tensor
    layout: Layout

    @classmethod
    def of(cls, batch: Texts, padding: int, kinds: int, device: torch.device, graphs: bool = False) -> Inputs:
        """`kinds`: how many kinds of tokens the model tells apart; `graphs`: lay out for a bucket."""
        rows, longest, tokens = len(batch.lengths), int(batch.lengths.max()), len(batch.input_ids)
        bucket = Bucket.of(batch.lengths) if graphs else None
        starts = bucket.starts(batch.lengths) if bucket else _starts(batch.lengths)
        sizes = [*[rows * longest] * 3, tokens, len(starts) // 2 + 1]
        host = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
        ids, mask, types, places, rest = np.split(host.numpy(), np.cumsum(sizes)[:-1])
        ids[:], mask[:], types[:] = padding, 0, 0
        places[:] = _places(batch.lengths, longest)
        ids[places], mask[places] = batch.input_ids, 1
        types[places] = np.minimum(batch.type_ids, max(kinds - 1, 0))  # roberta knows one kind, its tokenizer may two
        rest.view(np.int32)[: len(starts)] = starts
        here = host.to(device, non_blocking=True).split(sizes)
        layout = Layout(rows, longest, here[3], here[4].view(torch.int32)[: len(starts)], bucket)
        padded = [each.view(rows, longest) for each in here[:3]]
        return cls(padded[0], padded[1], padded[2], layout)


def _starts(lengths: NDArray[np.int64]) -> NDArray[np.int32]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def _places(lengths: NDArray[np.int64], longest: int) -> NDArray[np.int64]:
    """Each token's place in [sequences, longest], flat.  # [tokens]"""
    before = np.cumsum(lengths) - lengths
    moved = np.arange(len(lengths)) * longest - before
    places: NDArray[np.int64] = np.arange(int(lengths.sum())) + np.repeat(moved, lengths)
    return places
