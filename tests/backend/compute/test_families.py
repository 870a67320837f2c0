"""unsupported() and length_limit() on transformers' own configurations."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from backend.compute.attention.families import length_limit, unsupported

SERVED = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "opt",
    "gpt_neox",
    "phi",
    "granite",
    "smollm3",
    "mixtral",
    "qwen3_moe",
    "starcoder2",
    "stablelm",
    "cohere",
    "cohere2",
    "gpt_oss",
    "olmo",
    "olmo2",
    "phi3",
    "gpt2",
    "glm4",
    "nemotron",
]


@pytest.mark.parametrize("family", SERVED)
def test_served(family: str) -> None:
    assert unsupported(AutoConfig.for_model(family)) is None


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("t5", {}, "encoder-decoder"),
        ("bloom", {}, "AttentionInterface"),
        ("mpt", {}, "ALiBi"),
        ("falcon", {"alibi": True}, "ALiBi"),
        ("falcon", {}, "AttentionInterface"),
        ("gptj", {}, "AttentionInterface"),
        ("deepseek_v3", {}, "latent"),
        ("llama4_text", {}, "chunks"),
        ("mamba", {}, "state-space"),
        ("jamba", {}, "state-space"),
        ("bamba", {}, "state-space"),
        ("qwen3_next", {}, "linear_attention"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "later tokens"),
        ("gemma3n_text", {}, "share keys"),
        ("gpt2", {"add_cross_attention": True}, "cross attention"),
        ("clip", {}, "no causal language model"),
    ],
)
def test_refused(family: str, changes: dict[str, Any], reason: str) -> None:
    assert reason in str(unsupported(AutoConfig.for_model(family, **changes)))


def test_length_limit() -> None:
    def llama(**rope: Any) -> Any:
        return AutoConfig.for_model("llama", max_position_embeddings=512, rope_parameters={"rope_theta": 1e4, **rope})

    assert length_limit(AutoConfig.for_model("gpt2")) is None
    assert length_limit(AutoConfig.for_model("gemma3_text")) is None
    assert length_limit(llama(rope_type="linear", factor=2.0)) is None
    assert length_limit(llama(rope_type="dynamic", factor=2.0)) == 512
    long = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64, "original_max_position_embeddings": 128}
    assert length_limit(llama(rope_type="longrope", **long)) == 128
