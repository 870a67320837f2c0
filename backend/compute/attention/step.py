"""Step: the tensors of one plan on one device, beside the cache that they point into; it does not know the model.

It travels through transformers as the one keyword argument `step=` of the model's forward.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from backend.compute.attention.base import Kernel, Rule, kernel
from backend.compute.cache import KVCache
from backend.compute.upload import upload
from backend.generation.plan import Ints, Plan

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """S chunks of T tokens. graphs.Inputs makes static ones, whose tensors stay, for CUDA graphs."""

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
        device = torch.device(device)
        return cls(
            cache=cache,
            kv_slots=upload(plan.kv_slots, device),
            query_starts=upload(plan.query_starts, device),
            kv_lengths=upload(plan.kv_lengths, device),
            block_tables=upload(plan.block_tables, device),
            decode=len(plan.kv_slots) == len(plan.kv_lengths),
            host_starts=plan.query_starts,
            host_lengths=plan.kv_lengths,
            kernel=kernel(device.type),
        )

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        """One layer's attention: [heads, tokens, dim], twice [kv heads, tokens, dim] -> [tokens, heads, dim]."""
        return self.kernel.attend(query, key, value, layer, self, rule)

    def read(self, layer: int, query: Tensor, rule: Rule, output: Tensor | None = None) -> Tensor:
        """The same where the step's keys and values are in the cache already: [tokens, heads, dim], to and fro."""
        return self.kernel.read(query, layer, self, rule, output)

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` returns, made by the first layer that asks under this key."""
        if key not in self.kept:
            self.kept[key] = make()
        made: Made = self.kept[key]
        return made
