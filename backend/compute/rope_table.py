"""Rotary embeddings looked up in a table in place of computed anew each step; it does not know who rotates.

The table is made by the module itself, so it holds the very numbers that it would have given.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding


class RopeTable:
    """Stands for the forward of a rotary embedding, for positions below `longest`."""

    def __init__(self, module: Any, longest: int, dtype: torch.dtype, device: torch.device) -> None:
        self._forward = getattr(module.forward, "_forward", module.forward)  # a shorter table's, if there is one
        self._like = torch.empty(0, dtype=dtype, device=device)
        self._positions = torch.arange(longest, device=device)[None]
        self._tables: dict[Any, tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, position_ids: Tensor, layer_type: Any = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines [1, tokens, width] of positions [1, tokens], in the model's dtype."""
        if layer_type not in self._tables:
            kind = () if layer_type is None else (layer_type,)
            cos, sin = self._forward(self._like, self._positions, *kind)
            self._tables[layer_type] = cos[0], sin[0]
        cos, sin = self._tables[layer_type]
        return embedding(position_ids, cos), embedding(position_ids, sin)


def install(model: nn.Module, longest: int, dtype: torch.dtype, device: torch.device) -> int:
    """Give every rotary embedding a table; how many there are."""
    found = 0
    for module in model.modules():
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        if hasattr(module, "rope_type") and names in (["x", "position_ids"], ["x", "position_ids", "layer_type"]):
            module.forward = RopeTable(module, longest, dtype, device)
            found += 1
    return found
