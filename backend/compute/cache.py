"""KVCache: the keys and values of all layers, in blocks; it does not know whose a block is.

Layout: per layer one tensor [blocks + 1, block size, 2, kv heads, dim], keys at 0 and values at 1 of the third
dimension. A token's key and value lie side by side, so that one gather fetches both: on CPU, for 16 sequences of 500
tokens, in about two thirds of the time of two tensors. The last block is scratch: padding rows of a step write there.

A cache of float8 (e4m3, no scales: its exponent covers what keys and values are) halves the memory and the time to read
it. Every key and value is rounded to it before anything is computed from it, its own step included, so that a text does
not depend on how its prompt was cut into steps.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from backend.compute.attention.base import Rule
from backend.compute.attention.carry import carry_step
from backend.compute.attention.masks import disagreement, watching
from backend.compute.attention.paged import StepLost
from backend.errors import LoadError

FP8 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One layer's share of the cache on this rank."""

    kv_heads: int
    head_dim: int
    window: int = 0
    """Sliding window in tokens; 0: none."""
    rule: Rule | None = field(default=None, compare=False)
    """All of how the layer attends, as it asked for it; it holds tensors of the model."""


class KVCache:
    """Allocated once, zeroed; written by attention kernels only."""

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.specs = tuple(specs)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.device = torch.device(device)
        self.layers = [
            _zeros((num_blocks + 1, block_size, 2, spec.kv_heads, spec.head_dim), dtype, self.device) for spec in specs
        ]
        self._gathered = indexable(torch.empty(0, dtype=dtype, device=device))

    @property
    def scratch_slot(self) -> int:
        """The first token slot of the scratch block."""
        return self.num_blocks * self.block_size

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def tokens(self, layer: int) -> Tensor:
        """A layer by token slot: [slots, 2, kv heads, dim], a view."""
        return self.layers[layer].flatten(0, 1)

    def slots(self, block_tables: Tensor, positions: Tensor) -> Tensor:
        """Token slots of positions: [S, B] block numbers and [S, L] positions -> int64 [S, L]."""
        blocks = block_tables.long().gather(1, positions.long() // self.block_size)
        return blocks * self.block_size + positions % self.block_size

    def gather(self, layer: int, slots: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
        """Keys and values of [sequences * L] token slots, each [sequences, kv heads, L, dim].

        They lie in a buffer that the next call overwrites: allocating anew costs as much as the copy.
        """
        kv = indexable(self.tokens(layer))
        if self._gathered.numel() < slots.numel() * kv[0].numel():
            self._gathered = kv.new_empty(slots.numel() * kv[0].numel())
        buffer = self._gathered[: slots.numel() * kv[0].numel()].view(-1, *kv.shape[1:])
        torch.index_select(kv, 0, slots, out=buffer)
        keys, values = buffer.view(self.dtype).view(sequences, -1, *kv.shape[1:]).permute(2, 0, 3, 1, 4)
        return keys, values


def kept_as(name: str, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type of a cache beside weights of `dtype`, by its name in the configuration."""
    if name != "fp8":
        return dtype
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise LoadError("kv_cache_dtype fp8 needs a GPU of compute capability 8.9 or more")
    return FP8


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On CPU out of pages that take memory only once they are written: torch.zeros would write them all."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, prod(shape) * dtype.itemsize), dtype=dtype).view(shape)


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """What a cache keeps of them; beyond the range of float8 its largest value, where torch would give NaN."""
    if dtype == FP8:
        largest = torch.finfo(FP8).max
        values = values.clamp(-largest, largest)
    return values.to(dtype)


def write(kv: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> None:
    """Rounded [tokens, kv heads, dim] each into int64 [tokens] slots of one layer by token slot."""
    kv = indexable(kv)
    kv[:, 0].index_copy_(0, slots, indexable(key))
    kv[:, 1].index_copy_(0, slots, indexable(value))


def indexable(values: Tensor) -> Tensor:
    """The same bytes in a type that torch can index."""
    return values.view(torch.uint8) if values.dtype == FP8 else values


def bytes_per_block(specs: Sequence[LayerSpec], block_size: int, dtype: torch.dtype) -> int:
    """Memory of one block over all layers, keys and values."""
    return sum(2 * block_size * spec.kv_heads * spec.head_dim for spec in specs) * dtype.itemsize


class Recorder:
    """Stands where a Step would: notes each layer's shapes and rule, and answers zeros."""

    def __init__(self) -> None:
        self.specs: dict[int, LayerSpec] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        if layer in self.specs:
            raise LoadError(f"layer {layer} calls attention twice: the family is not supported")
        if key.shape != value.shape or key.shape[2] != query.shape[2]:
            raise LoadError(
                f"layer {layer} has query, key and value of head size {query.shape[2]}, {key.shape[2]}, "
                f"{value.shape[2]}: paged attention needs them equal"
            )
        if query.shape[0] % key.shape[0]:
            raise LoadError(f"layer {layer} has {query.shape[0]} heads on {key.shape[0]} kv heads: not a multiple")
        self.specs[layer] = LayerSpec(key.shape[0], key.shape[2], rule.window, rule)
        return torch.zeros_like(query.transpose(0, 1))


def _record(model: Any, device: torch.device | str) -> Recorder:
    recorder = Recorder()
    tokens = torch.arange(2, device=device)[None]
    model(input_ids=tokens, position_ids=tokens, use_cache=False, step=recorder)
    return recorder


def probe(model: Any, device: torch.device | str) -> list[LayerSpec]:
    """What each layer needs of the cache, found by one forward of two tokens: every rank of a group calls it together.

    LoadError where a layer does not go through transformers' AttentionInterface, calls it twice, needs what paged
    attention lacks, or where its window is not the one that its configuration and transformers' own mask state.
    """
    with torch.inference_mode(), watching(model) as masks:
        try:
            recorder = _record(model, device)
        except StepLost:
            carry_step(model)
            recorder = _record(model, device)
    config = model.config.get_text_config()
    expected = getattr(config, "num_hidden_layers", len(recorder.specs))
    if missing := sorted(set(range(expected)) - recorder.specs.keys()) or not recorder.specs:
        raise LoadError(f"{config.model_type}: layers {missing} do not use transformers' AttentionInterface")
    for layer, spec in recorder.specs.items():
        if reason := disagreement(config, layer, spec.window, masks.get(layer)):
            raise LoadError(f"{config.model_type}: {reason}")
    return [recorder.specs[layer] for layer in range(expected)]
