"""Tiny random models of many families, saved as real checkpoints are."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 131
"""Odd, so that no number of ranks divides it."""

_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EVEN = _SMALL | {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}
_WHOLE = {key: value for key, value in _EVEN.items() if key != "num_key_value_heads"}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _SMALL | {"rope_parameters": _LLAMA3}),
    "llama-tied": ("llama", _SMALL | {"tie_word_embeddings": True}),
    "llama-bias": ("llama", _SMALL | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", _SMALL | {"sliding_window": 5, "head_dim": 8}),
    "qwen2": ("qwen2", _SMALL),
    "qwen3": ("qwen3", _SMALL | {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma": ("gemma", _SMALL | {"head_dim": 8}),
    "gemma2": ("gemma2", _SMALL | {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("gemma3_text", _SMALL | {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8}),
    "opt": (
        "opt",
        {
            "vocab_size": VOCAB,
            "hidden_size": 72,
            "word_embed_proj_dim": 40,
            "ffn_dim": 100,
            "num_hidden_layers": 2,
            "num_attention_heads": 9,
            "max_position_embeddings": 128,
            "pad_token_id": 1,
        },
    ),
    "gpt_neox": ("gpt_neox", _WHOLE | {"rotary_pct": 0.5}),
    "phi": ("phi", _EVEN | {"partial_rotary_factor": 0.5}),
    "granite": (
        "granite",
        _SMALL
        | {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    ),
    "smollm3": ("smollm3", _SMALL | {"no_rope_layers": [1, 0]}),
    "mixtral": ("mixtral", _SMALL | _EXPERTS),
    "qwen3_moe": (
        "qwen3_moe",
        _SMALL
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
        | {"mlp_only_layers": [1]},
    ),
    "starcoder2": ("starcoder2", _SMALL | {"sliding_window": 5}),
    "stablelm": ("stablelm", _SMALL | {"use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "cohere": ("cohere", _SMALL | {"logit_scale": 0.5}),
    "glm4": ("glm4", _SMALL | {"head_dim": 8, "partial_rotary_factor": 0.5, "attention_bias": True}),
}
"""Name -> (model_type, config); heads and vocabulary uneven wherever the family allows it."""

_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("phi3", _EVEN),
    "olmo2": ("olmo2", _EVEN),
    "gpt2": ("gpt2", {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 8, "n_positions": 128} | _IDS),
}
"""As FAMILIES: right on one rank, refused on more."""

UNSERVABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 8} | _IDS),
    "falcon": (
        "falcon",
        {"vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8} | _IDS,
    ),
    "gptj": ("gptj", {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 8, "rotary_dim": 4} | _IDS),
}
"""As FAMILIES: their attention does not go through transformers' interface."""


def write(name: str, folder: Path, dtype: torch.dtype = torch.float32, **saving: Any) -> Path:
    """Save a random model of a family as a checkpoint folder; every parameter is random, biases and norms too."""
    family, settings = (FAMILIES | REFUSED | UNSERVABLE)[name]
    torch.manual_seed(len(name))
    config = transformers.AutoConfig.for_model(family, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape) * 0.15
            parameter.copy_(noise if parameter.dim() > 1 else parameter.float() + noise)
    model.save_pretrained(folder, **saving)
    return folder


def inputs() -> torch.Tensor:
    """Return token ids, longer than any window.  # [2, 24]"""
    return torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))


@cache
def expected(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Compute the logits of plain transformers.  # [2, 24, vocab]"""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=dtype)
    with torch.inference_mode():
        logits: torch.Tensor = model.eval()(inputs(), use_cache=False).logits
    return logits
