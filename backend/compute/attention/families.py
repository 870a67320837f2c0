"""Whether paged attention can serve transformers' class for a model; it loads nothing and computes nothing.

The check comes before loading, so that a refusal costs no time. What a configuration does not say, `cache.probe` finds.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from backend.families import refusal, rope_limit, varies


def unsupported(config: Any) -> str | None:
    """Why this family cannot be served, in half a sentence; None where nothing speaks against it."""
    if reason := refusal(config.to_dict()):
        return reason
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "transformers has no causal language model of this type"
    if not _uses_interface(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]):
        return "its attention does not go through transformers' AttentionInterface"
    return None


def length_limit(config: Any) -> int | None:
    """Tokens that can be served whatever shares the batch; None: any number. See `families.rope_limit`."""
    return rope_limit(config.get_text_config().to_dict())


def freeze_rope(model: nn.Module) -> None:
    """Keep the frequencies that rotary embeddings start with: right for texts up to `length_limit` tokens.

    transformers would look at the longest position of every forward, which waits for the device and cannot be
    captured in a CUDA graph.
    """
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, dict):  # by type of layer
            module.rope_type = {layer: _frozen(one) for layer, one in kind.items()}  # type: ignore[assignment]
        elif isinstance(kind, str):
            module.rope_type = _frozen(kind)  # type: ignore[assignment]


def _frozen(kind: str) -> str:
    return "default" if varies(kind) else kind


def _uses_interface(model: Any) -> bool:
    return hasattr(sys.modules[model.__module__], "ALL_ATTENTION_FUNCTIONS")
