"""Classifier-free guidance over several ranks: each denoises some rows of the doubled batch. It knows no pipeline.

Guidance runs the denoiser on every image twice, with the prompt and without (Ho and Salimans 2022). Those rows do not
see each other, so each rank computes one of them, and all gather the result; all else is computed by all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from backend.compute.tensor_parallel import all_gather


@contextmanager
def shared_guidance(denoiser: nn.Module, rows: int, rank: int, world: int) -> Iterator[None]:
    """Within it, a call of the denoiser on `rows` rows computes one of them here; all ranks call alike.

    Where there are more ranks than rows the later ones compute the same again: what waits for it would be as long. A
    call on another number of rows (no guidance) is computed whole by every rank.
    """
    whole = denoiser.forward
    own = slice(rank % rows, rank % rows + 1)

    def forward(*values: Any, **named: Any) -> Any:
        if batch_size(values, named) != rows:
            return whole(*values, **named)
        found = whole(*cut(values, rows, own), **cut(named, rows, own))
        return (all_gather(found[0].contiguous(), world)[:rows].flatten(0, 1), *found[1:])

    denoiser.forward = forward
    try:
        yield
    finally:
        denoiser.forward = whole


def batch_size(values: tuple[Any, ...], named: dict[str, Any]) -> int:
    """Rows of the noisy images, the denoiser's first argument."""
    images: Tensor = values[0] if values else named["hidden_states"]
    return images.shape[0]


def cut(value: Any, rows: int, own: slice) -> Any:
    """Its own rows of every tensor that has `rows`, in tuples and dictionaries too; all else as it is."""
    if isinstance(value, torch.Tensor):
        return value[own] if value.ndim and value.shape[0] == rows else value
    if isinstance(value, dict):
        return {name: cut(each, rows, own) for name, each in value.items()}
    return tuple(cut(each, rows, own) for each in value) if isinstance(value, tuple) else value
