"""What a model's configuration says that paged attention cannot serve; it loads nothing and computes nothing.

The check comes before loading, so that a refusal costs no time. What a configuration does not say, `cache.probe` finds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

KINDS = frozenset({"full_attention", "sliding_attention"})
"""The entries of `layer_types` that paged attention computes."""

_STRUCTURES: tuple[tuple[str, Callable[[Any], Any]], ...] = (
    ("it is an encoder-decoder", lambda c: c.get("is_encoder_decoder")),
    ("it has cross attention", lambda c: c.get("add_cross_attention") or c.get("cross_attention_layers")),
    ("it biases attention by distance (ALiBi)", lambda c: c.get("alibi") or _inner(c, "attn_config", "alibi")),
    ("it has latent attention (MLA)", lambda c: c.get("kv_lora_rank")),
    ("it attends in chunks", lambda c: c.get("attention_chunk_size")),
    ("its attention sees later tokens", lambda c: c.get("use_bidirectional_attention") or c.get("is_causal") is False),
    ("its layers share keys and values", lambda c: c.get("num_kv_shared_layers")),
    ("it has state-space layers", lambda c: c.get("state_size") or c.get("mamba_d_state") or c.get("ssm_state_size")),
)
"""(what a model has, whether a configuration as a mapping has it)"""


def unsupported(config: Any) -> str | None:
    """Why this family cannot be served, in half a sentence; None where nothing speaks against it."""
    text = config.get_text_config()
    return next(_reasons(config, text), None)


def length_limit(config: Any) -> int | None:
    """Tokens up to which a position's rotary embedding depends on that position alone; None: any number.

    With `longrope` and `dynamic` scaling transformers picks the frequencies of a whole batch by its longest text, so a
    long text would change its neighbours' results, and its own keys in the cache would no longer fit.
    """
    limits = [_limit(config, rope) for rope in _ropes(config.get_text_config())]
    return min((limit for limit in limits if limit), default=None)


def _reasons(config: Any, text: Any) -> Iterator[str]:
    for part in (config.to_dict(), text.to_dict()):
        yield from (reason for reason, has in _STRUCTURES if has(part))
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    if other := sorted(set(kinds) - KINDS):
        yield f"it has layers of type {other[0]}"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        yield "transformers has no causal language model of this type"
    elif not _uses_interface(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]):
        yield "its attention does not go through transformers' AttentionInterface"


def _uses_interface(model: Any) -> bool:
    return hasattr(sys.modules[model.__module__], "ALL_ATTENTION_FUNCTIONS")


def _inner(config: Any, name: str, field: str) -> Any:
    inner = config.get(name) or {}
    return inner.get(field) if isinstance(inner, dict) else getattr(inner, field, None)


def _ropes(text: Any) -> list[dict[str, Any]]:
    """The rope parameters, one set or one a layer type."""
    parameters = getattr(text, "rope_parameters", None) or {}
    return [parameters, *(value for value in parameters.values() if isinstance(value, dict))]


def _limit(config: Any, rope: dict[str, Any]) -> int | None:
    kind, text = str(rope.get("rope_type", "")), config.get_text_config()
    if kind == "longrope":
        original = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", 0)
        return int(original or text.max_position_embeddings)
    return int(text.max_position_embeddings) if "dynamic" in kind else None
