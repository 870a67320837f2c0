"""Step: the tensors of one plan on one device, beside the cache that they point into; it does not know the model.

It travels through transformers as the one keyword argument `step=` of the model's forward.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from backend.compute.attention.base import Kernel, Rule, kernel
from backend.compute.cache import KVCache
from backend.compute.upload import staged, upload
from backend.generation.plan import Ints, Longs, Plan

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """S chunks of T tokens. A static step (see `static`) keeps its shapes and tensors, so a CUDA graph can hold it."""

    cache: KVCache
    kv_slots: Tensor  # int64 [T]
    query_starts: Tensor  # int32 [S + 1]
    kv_lengths: Tensor  # int32 [S]
    block_tables: Tensor  # int32 [S, B]
    decode: bool
    """Whether every chunk is one token."""
    host_starts: Ints  # [S + 1], query_starts; only kernels for steps that are not static may look
    host_lengths: Ints  # [S], kv_lengths; the same
    kernel: Kernel
    kept: dict[Hashable, Any] = field(default_factory=dict)
    """What kernels derive once a step and use in every layer; use `once`."""

    @classmethod
    def from_plan(cls, plan: Plan, device: torch.device | str, cache: KVCache) -> Step:
        """The plan's arrays on the device."""
        return cls._of(
            cache, torch.device(device), plan.kv_slots, plan.query_starts, plan.kv_lengths, plan.block_tables
        )

    @classmethod
    def static(cls, cache: KVCache, sequences: int, table_width: int) -> Step:
        """A decode step of fixed shapes whose rows are all padding until `fill`."""
        return cls._of(cache, cache.device, *_padded(cache, sequences, table_width))

    def fill(self, plan: Plan) -> None:
        """Put a decode plan's values into this static step's tensors; rows beyond the plan's become padding."""
        rows, width = self.block_tables.shape
        arrays = _padded(self.cache, rows, width)
        count, blocks = plan.block_tables.shape
        arrays[0][:count] = plan.kv_slots
        arrays[2][:count] = plan.kv_lengths
        arrays[3][:count, :blocks] = plan.block_tables
        device = self.cache.device
        self.kv_slots.copy_(staged(arrays[0], device), non_blocking=True)
        self.kv_lengths.copy_(staged(arrays[2], device), non_blocking=True)
        self.block_tables.copy_(staged(arrays[3], device), non_blocking=True)

    @classmethod
    def _of(cls, cache: KVCache, device: torch.device, slots: Longs, starts: Ints, lengths: Ints, tables: Ints) -> Step:
        return cls(
            cache=cache,
            kv_slots=upload(slots, device),
            query_starts=upload(starts, device),
            kv_lengths=upload(lengths, device),
            block_tables=upload(tables, device),
            decode=len(slots) == len(lengths),
            host_starts=starts,
            host_lengths=lengths,
            kernel=kernel(device.type),
        )

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        """One layer's attention: [heads, tokens, dim], twice [kv heads, tokens, dim] -> [tokens, heads, dim]."""
        return self.kernel.attend(query, key, value, layer, self, rule)

    def read(self, layer: int, query: Tensor, rule: Rule) -> Tensor:
        """The same where the step's keys and values are in the cache already: [tokens, heads, dim], to and fro."""
        return self.kernel.read(query, layer, self, rule)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` returns, made by the first layer that asks under this key."""
        if key not in self.kept:
            self.kept[key] = make()
        made: Made = self.kept[key]
        return made


def _padded(cache: KVCache, rows: int, width: int) -> tuple[Longs, Ints, Ints, Ints]:
    """Arrays of a decode step without sequences: every row writes to the scratch block and reads nothing."""
    slots = np.full(rows, cache.scratch_slot, np.int64)
    return slots, np.arange(rows + 1, dtype=np.int32), np.zeros(rows, np.int32), np.zeros((rows, width), np.int32)
