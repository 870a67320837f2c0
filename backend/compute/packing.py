"""Packing: an encoder's layers on the tokens alone, without padding; what lies around the layers sees padded tensors.

Texts enter the stack of layers end to end as one row and attend each to itself (variable-length attention, as in
FlashAttention's varlen form). Embeddings, poolers and heads stay as transformers has them, so any family fits whose
layers take hidden states first and whose attention goes through transformers' AttentionInterface.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

NAME = "packed"

_HALF = (torch.float16, torch.bfloat16)
_LONGEST_HEAD = 256


@dataclass(frozen=True, slots=True, eq=False)
class Spread:
    """Where each sequence lies among the tokens; it goes down to attention in the mask's place."""

    starts: Tensor  # [sequences + 1] int32
    longest: int

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: tuple[int, int]) -> Tensor:
        """Each sequence to itself.  # [tokens, heads, dim], twice [tokens, kv heads, dim] -> [tokens, heads, dim]"""
        if query.device.type == "cuda":
            return _varlen(self, query, key, value, scale, window)
        edges = self.starts.tolist()
        parts = [slice(begin, end) for begin, end in pairwise(edges)]
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
    """One sequence, the plain way: what the kernel is tested against.  # [tokens, heads, dim]"""
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
    query, key, value = (each[0].transpose(0, 1).contiguous() for each in (query, key, value))
    return attention_mask.attend(query, key, value, scaling, (side, 0 if causal else side))[None], None


_UNKNOWN = {"softcap", "s_aux", "head_mask", "position_bias", "relative_position_bias"}


def register() -> None:
    """Tell transformers of it; no mask is made under this name."""
    AttentionInterface.register(NAME, packed)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def packable(model_class: type, config: Any, dtype: torch.dtype) -> bool:
    """Whether a class's attention goes through the interface and the kernel takes its dtype and heads."""
    heads = getattr(config, "num_attention_heads", 0) or 1
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    through = hasattr(sys.modules[model_class.__module__], "ALL_ATTENTION_FUNCTIONS")
    return through and dtype in _HALF and size % 8 == 0 and size <= _LONGEST_HEAD


class Packing:
    """Hooks around a model's stack of layers. `enter` before each forward tells it which tokens there are."""

    def __init__(self, model: PreTrainedModel) -> None:
        register()
        model.set_attn_implementation(NAME)
        layers = _stack(model)
        self._takes = inspect.signature(layers[0].forward)
        self._hooks = [layer.register_forward_pre_hook(self._before, with_kwargs=True) for layer in layers]
        self._hooks.append(layers[-1].register_forward_hook(self._after))

    def enter(self, shape: tuple[int, int], places: Tensor, starts: Tensor) -> None:
        """[sequences, longest]; the tokens' places in that, flat [tokens]; where each begins [sequences + 1] int32."""
        self._shape, self._places, self._spread = shape, places, Spread(starts, shape[1])

    def remove(self) -> None:
        """Leave the layers as they were."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        bound = self._takes.bind(*args, **kwargs)
        given = {name: self._pack(value) for name, value in bound.arguments.items()}
        bound.arguments.update(given)
        for part in (bound.arguments, bound.arguments.get("kwargs", {})):
            if "attention_mask" in part:
                part["attention_mask"] = self._spread
        bound.arguments.setdefault("attention_mask", self._spread)
        return bound.args, bound.kwargs

    def _pack(self, value: Any) -> Any:
        """Tensors of one value a token, and tuples and mappings of them.  # [n, longest, ...] -> [1, tokens, ...]"""
        if isinstance(value, tuple):
            return tuple(map(self._pack, value))
        if isinstance(value, dict):
            return {name: self._pack(each) for name, each in value.items()}
        rows, longest = self._shape
        if (
            not isinstance(value, Tensor)
            or value.dim() < 2
            or value.shape[1] != longest
            or value.shape[0] not in (1, rows)
        ):
            return value
        whole = value.expand(rows, *value.shape[1:]) if value.shape[0] != rows else value
        return whole.reshape(rows * longest, *value.shape[2:])[self._places][None]

    def _after(self, layer: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        rows, longest = self._shape
        padded = hidden.new_zeros(rows * longest, hidden.shape[-1])
        padded[self._places] = hidden[0]
        whole = padded.view(rows, longest, hidden.shape[-1])
        return (whole, *output[1:]) if isinstance(output, tuple) else whole


def _stack(model: PreTrainedModel) -> nn.ModuleList:
    """The list of layers."""
    count = getattr(model.config, "num_hidden_layers", 0)
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found:
        raise RuntimeError(f"{type(model).__name__} has no list of {count} layers")
    return found[0]
