"""Packing: an encoder's layers on the tokens alone, without padding; what lies around the layers sees padded tensors.

Texts enter the stack of layers end to end as one row and attend each to itself. Embeddings, poolers and heads stay as
transformers has them, so any family fits whose layers take hidden states first, hand them on to each other untouched,
and whose attention goes through transformers' AttentionInterface.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from backend.compute.encoders.attention import NAME, Spread, register
from backend.compute.encoders.buckets import Bucket
from backend.compute.encoders.graphs import StackGraphs
from backend.compute.encoders.recorded_layers import Call, Layers


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Which tokens there are in a padded micro-batch."""

    rows: int
    longest: int
    places: Tensor  # [tokens], their places in [rows, longest], flat
    starts: Tensor  # [rows + 1 or more] int32; with a bucket, those of its sequences
    bucket: Bucket | None = None

    def has(self, value: Tensor) -> bool:
        """Whether it has one value a token.  # [rows or 1, longest, ...]"""
        return value.dim() > 1 and value.shape[1] == self.longest and value.shape[0] in (1, self.rows)

    def pack(self, value: Tensor, out: Tensor | None = None) -> Tensor:
        """# [rows or 1, longest, ...] -> [1, tokens, ...], or the first tokens of out [1, more tokens, ...]"""
        alike = value.shape[0] != self.rows  # the same for all rows
        flat = value[0] if alike else value.reshape(self.rows * self.longest, *value.shape[2:])
        places = self.places % self.longest if alike else self.places
        if out is None:
            return flat.index_select(0, places)[None]
        torch.index_select(flat, 0, places, out=out[0, : len(places)])
        return out

    def unpack(self, packed: Tensor) -> Tensor:
        """Zero where there is padding.  # [1, at least tokens, hidden] -> [rows, longest, hidden]"""
        size = packed.shape[-1]
        padded = packed.new_zeros(self.rows * self.longest, size)
        padded.index_copy_(0, self.places, packed[0, : len(self.places)])
        return padded.view(self.rows, self.longest, size)


class Packing:
    """Around a model's stack of layers. `enter` before each forward tells it which tokens there are."""

    def __init__(self, model: PreTrainedModel) -> None:
        register()
        self._model, self._usual = model, model.config._attn_implementation
        self.graphs: StackGraphs | None = None
        self._layers = Layers(model, self._has, self._run)
        model.set_attn_implementation(NAME)

    def graph(
        self, most: int, capture: Callable[..., Callable[[], None]], agree: Callable[[bool], bool]
    ) -> StackGraphs:
        """From now on use graphs, for micro-batches of up to `most` tokens; see StackGraphs."""
        self.graphs = StackGraphs(self._layers.compute, most, capture, agree)
        return self.graphs

    def enter(self, layout: Layout) -> None:
        self._layout = layout

    def remove(self) -> None:
        """Leave the model as it was."""
        self._layers.remove()
        self._model.set_attn_implementation(self._usual)

    def _has(self, value: Tensor) -> bool:
        return self._layout.has(value)

    def _run(self, calls: list[Call], values: list[Tensor]) -> Tensor:
        """# [rows, longest, hidden] -> the same after all layers"""
        layout = self._layout
        found = self._replayed(calls, values) if self.graphs and layout.bucket else None
        if found is None:
            spread = Spread(layout.starts[: layout.rows + 1], layout.longest)
            found = self._layers.compute(calls, [layout.pack(value) for value in values], spread)
        return layout.unpack(found)

    def _replayed(self, calls: list[Call], values: list[Tensor]) -> Tensor | None:
        layout = self._layout
        assert self.graphs is not None and layout.bucket is not None

        def fill(buffers: list[Tensor]) -> None:
            for value, out in zip(values, buffers, strict=True):
                layout.pack(value, out)

        return self.graphs.run(layout.bucket, calls, values, layout.starts, fill)
