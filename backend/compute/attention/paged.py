"""paged(): what transformers calls for every attention layer; it does not know which kernel computes.

Registered with transformers' AttentionInterface under the name `paged`. No mask function is registered under that
name: transformers then makes no mask at all (masking_utils, "we don't need a mask"), and this function derives
causality and the window from the step itself.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

from backend.compute.attention.base import Rule
from backend.errors import LoadError

NAME = "paged"

HARMLESS = frozenset(
    {
        "position_ids",  # rotary embedding is applied before; StableLM passes them for FlashAttention
        "position_embeddings",  # the same, as cosines and sines
        "cache_position",  # the plan says where keys and values go
        "use_cache",  # transformers' own cache is not used
        "logits_to_keep",  # concerns the head, not attention
        "num_items_in_batch",  # concerns the loss
        "output_router_logits",  # concerns the experts
    }
)
"""Keyword arguments that reach attention and cannot change its result."""

EMPTY = (None, False)
"""Values with which any keyword argument asks for nothing (`is_causal` excepted)."""


class StepLost(LoadError):
    """A family's modules did not hand `step` down to attention."""


class Attention(Protocol):
    """What may stand behind `step=`: a Step, or a probe's recorder."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor: ...


def paged(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    *,
    step: Attention | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend every chunk of `step` to its sequence's whole context, its new keys and values included.

    Query [1, heads, tokens, dim], key and value [1, kv heads, tokens, dim], rotary embedding applied; returns
    [1, tokens, heads, dim]. LoadError names an argument that would change the result and is not understood.
    """
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    _refuse(attention_mask is not None, module, "attention_mask")
    _refuse(dropout != 0.0, module, "dropout")
    _refuse(not is_causal, module, "is_causal=False")
    for name, given in kwargs.items():
        if name not in HARMLESS:
            _refuse(not any(given is empty for empty in EMPTY), module, name)
    if step is None:
        raise StepLost(f"{type(module).__name__} was not handed `step`: the family is not supported")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    rule = Rule(scale, sliding_window or 0, softcap or 0.0, s_aux)
    return step.attend(_layer(module), query[0], key[0], value[0], rule)[None], None


def register() -> None:
    """Make `attn_implementation="paged"` known to transformers; may be called again."""
    AttentionInterface.register(NAME, paged)


def _refuse(condition: bool, module: torch.nn.Module, argument: str) -> None:
    if condition:
        raise LoadError(
            f"{type(module).__name__} calls attention with {argument}, which paged attention does not support"
        )


def _layer(module: torch.nn.Module) -> int:
    index = getattr(module, "layer_idx", None)
    if not isinstance(index, int):
        raise LoadError(f"{type(module).__name__} has no layer_idx: the family is not supported")
    return index
