"""What a model's configuration says that generation cannot serve; it knows neither torch nor transformers.

Configurations are mappings here: config.json as it stands, or transformers' reading of it with every default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from backend.json_file import values_of

Config = Mapping[str, Any]

KINDS = frozenset({"full_attention", "sliding_attention"})
"""The entries of `layer_types` that paged attention computes."""

_STRUCTURES: tuple[tuple[str, Callable[[Config], Any]], ...] = (
    ("it is an encoder-decoder", lambda c: c.get("is_encoder_decoder")),
    ("it has cross attention", lambda c: c.get("add_cross_attention") or c.get("cross_attention_layers")),
    ("it biases attention by distance (ALiBi)", lambda c: c.get("alibi") or _inner(c, "attn_config", "alibi")),
    ("it has latent attention (MLA)", lambda c: c.get("kv_lora_rank")),
    ("it attends in chunks", lambda c: c.get("attention_chunk_size")),
    ("its attention sees later tokens", lambda c: c.get("use_bidirectional_attention") or c.get("is_causal") is False),
    ("its layers share keys and values", lambda c: c.get("num_kv_shared_layers")),
    ("it has state-space layers", lambda c: c.get("state_size") or c.get("mamba_d_state") or c.get("ssm_state_size")),
)
"""(what a model has, whether a configuration has it)"""


@values_of("config.json")
def refusal(config: Config) -> str | None:
    """Why a model cannot be served, in half a sentence; None where its configuration does not speak against it."""
    return next(_reasons(config), None)


def rope_limit(config: Config) -> int | None:
    """Tokens up to which a position's rotary embedding depends on that position alone; None: any number.

    With `longrope` and `dynamic` scaling transformers picks the frequencies of a whole batch by its longest text, so a
    long text would change its neighbours' results, and its own keys in the cache would no longer fit. `config` is
    that of the language model alone.
    """
    limits = [_limit(config, rope) for rope in ropes(config)]
    return min((limit for limit in limits if limit), default=None)


def ropes(config: Config) -> list[Config]:
    """Every rotary embedding that the configuration describes: one, or one for each kind of layer."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    nested = [value for value in given.values() if isinstance(value, Mapping)]
    return nested or [given]


def rope_type(rope: Config) -> str:
    """Its name in transformers, or an older one."""
    return str(rope.get("rope_type") or rope.get("type") or "default")


def original(rope: Config, config: Config) -> Any:
    """Tokens that the model was trained with before this rotary embedding was stretched; None where nothing says so.

    Stated outside the rotary embedding (Phi-3) it goes first, as in transformers.
    """
    return config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")


def varies(kind: str) -> bool:
    """Whether transformers chooses the frequencies of this type of rotary embedding by the longest text of a batch."""
    return "dynamic" in kind or kind in ("longrope", "su")


def _reasons(config: Config) -> Iterator[str]:
    text = config.get("text_config")
    parts = [config, text] if isinstance(text, Mapping) else [config]
    for part in parts:
        yield from (reason for reason, has in _STRUCTURES if has(part))
    kinds = parts[-1].get("layer_types") or parts[-1].get("layers_block_type") or ()
    if other := sorted(set(kinds) - KINDS):
        yield f"it has layers of type {other[0]}"


def _limit(config: Config, rope: Config) -> int | None:
    kind, longest = rope_type(rope), config.get("max_position_embeddings")
    if not varies(kind):
        return None
    limit = longest if "dynamic" in kind else original(rope, config) or longest
    return int(limit) if limit else None


def _inner(config: Config, name: str, field: str) -> Any:
    inner = config.get(name)
    return inner.get(field) if isinstance(inner, Mapping) else None
