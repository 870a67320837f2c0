"""Attention among tokens of several sequences that lie end to end, each sequence to itself; it knows no layers.

FlashAttention's varlen form on CUDA; elsewhere one sequence after the other: what the kernel is tested against.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "packed"

_HALF = (torch.float16, torch.bfloat16)
_LONGEST_HEAD = 256


@dataclass(frozen=True, slots=True, eq=False)
class Spread:
    """Where each sequence lies among the tokens; it goes down to attention in the mask's place."""

    starts: Tensor  # [sequences + 1] int32; equal neighbours are a sequence of no tokens
    longest: int
    """No sequence has more tokens."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: tuple[int, int]) -> Tensor:
        """Each sequence to itself.  # [tokens, heads, dim], twice [tokens, kv heads, dim] -> [tokens, heads, dim]"""
        if query.device.type == "cuda":
            return _varlen(self, query, key, value, scale, window)
        parts = [slice(begin, end) for begin, end in pairwise(self.starts.tolist()) if end > begin]
        return torch.cat([_plain(query[part], key[part], value[part], scale, window) for part in parts])


def _varlen(
    spread: Spread, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: tuple[int, int]
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    groups = query.shape[1] // key.shape[1]
    if groups > 1:  # torch 2.11 has no enable_gqa here
        key, value = (each.repeat_interleave(groups, 1) for each in (key, value))
    starts, longest = spread.starts, spread.longest
    found = varlen_attn(query, key, value, starts, starts, longest, longest, scale=scale, window_size=window)
    assert isinstance(found, Tensor)
    return found


def _plain(query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: tuple[int, int]) -> Tensor:
    """One sequence, the plain way.  # [tokens, heads, dim]"""
    at = torch.arange(len(query), device=query.device)
    apart = at[None, :] - at[:, None]  # key's position from the query's
    seen = torch.ones_like(apart, dtype=torch.bool)
    if window[0] >= 0:
        seen &= apart >= -window[0]
    if window[1] >= 0:
        seen &= apart <= window[1]
    groups = query.shape[1] // key.shape[1]
    keys, values = (each.repeat_interleave(groups, 1).transpose(0, 1) for each in (key, value))
    found = nn.functional.scaled_dot_product_attention(query.transpose(0, 1), keys, values, attn_mask=seen, scale=scale)
    return found.transpose(0, 1)


def packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls for every layer.  # [1, heads, tokens, dim] -> [1, tokens, heads, dim]

    RuntimeError where the layer asks for something that is not honoured: a result without it would be wrong.
    """
    if not isinstance(attention_mask, Spread):
        raise RuntimeError("packed attention was called outside the packed layers")
    if strange := [name for name, given in kwargs.items() if given is not None and name in _UNKNOWN]:
        raise RuntimeError(f"packed attention does not know {strange[0]}")
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    side = -1 if sliding_window is None else sliding_window - 1  # as transformers counts it for FlashAttention
    query, key, value = (_dense(each[0].transpose(0, 1)) for each in (query, key, value))
    return attention_mask.attend(query, key, value, scaling, (side, 0 if causal else side))[None], None


def _dense(heads: Tensor) -> Tensor:
    """As the kernel takes it: numbers of a head side by side, so that slices of a merged projection need no copy."""
    return heads if heads.stride(-1) == 1 else heads.contiguous()


_UNKNOWN = {"softcap", "s_aux", "head_mask", "position_bias", "relative_position_bias"}


def register() -> None:
    """Tell transformers of it. It makes no mask for attention of which it knows no mask."""
    AttentionInterface.register(NAME, packed)


def packable(model_class: type, config: Any, dtype: torch.dtype) -> bool:
    """Whether a class's attention goes through the interface and the kernel takes its dtype and heads."""
    heads = getattr(config, "num_attention_heads", 0) or 1
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    through = hasattr(sys.modules[model_class.__module__], "ALL_ATTENTION_FUNCTIONS")
    return through and dtype in _HALF and size % 8 == 0 and size <= _LONGEST_HEAD
