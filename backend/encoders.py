"""What an encoder's folder says, and whether it can be served as a task; it knows neither torch nor transformers."""

from __future__ import annotations

from backend.errors import LoadError
from backend.json_file import optional, values_of
from backend.model_folder import Checkpoint, longest_text

SHARDABLE_ENCODERS = frozenset("bert roberta xlm-roberta distilbert electra deberta-v2 camembert".split())  # noqa: SIM905
"""Families whose output under AutoTP equals the whole model's: tests/backend/compute/test_encoder.py shows each."""

_UNSHARDABLE = {
    "modernbert": "its queries, keys and values are one projection that DeepSpeed cuts in the wrong places",
    "mpnet": "its attention counts the heads of the whole model",
}

_OFFSET = frozenset("roberta xlm-roberta xlm-roberta-xl camembert mpnet data2vec-text roberta-prelayernorm".split())  # noqa: SIM905
"""Families whose positions begin behind the padding token's number."""


@values_of("config.json")
def check_task(checkpoint: Checkpoint, tensor_parallel: int) -> None:
    """LoadError unless this model can be split so, with the right result."""
    family = checkpoint.model_type
    if checkpoint.config.get("is_encoder_decoder"):
        raise LoadError(f"{family} is an encoder with a decoder, which is not supported")
    if tensor_parallel > 1 and family not in SHARDABLE_ENCODERS:
        reason = _UNSHARDABLE.get(family, "it has not been shown that DeepSpeed shards it correctly")
        raise LoadError(f"{family} cannot be split over {tensor_parallel} ranks: {reason}; use tensor_parallel 1")
    heads = int(checkpoint.config.get("num_attention_heads") or checkpoint.config.get("n_heads") or tensor_parallel)
    if heads % tensor_parallel:
        raise LoadError(f"{family} has {heads} attention heads, which {tensor_parallel} ranks cannot share evenly")


@values_of("config.json")
def longest(checkpoint: Checkpoint, asked: int) -> int:
    """Tokens of the longest sequence: the model's positions, the tokenizer's limit, or fewer where asked.

    LoadError as `longest_text` raises it.
    """
    positions = checkpoint.max_model_len
    if checkpoint.model_type in _OFFSET and positions:
        positions -= int(checkpoint.config.get("pad_token_id", 1)) + 1
    stated = optional(checkpoint.folder / "tokenizer_config.json").get("model_max_length")
    return longest_text(asked, positions, stated if isinstance(stated, int) else 0)
