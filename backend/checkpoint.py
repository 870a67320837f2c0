"""Whether a checkpoint can be served with the right result, by family and heads; not whether it fits the devices.

It decides from files alone, before any process is started; torch is never imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from backend.config import EngineConfig
from backend.errors import LoadError, require
from backend.families import refusal
from backend.json_file import values_of
from backend.model_folder import Checkpoint

SHARDABLE = frozenset(
    """
    cohere gemma gemma2 gemma3_text glm4 gpt_neox granite llama mistral mixtral opt phi qwen2 qwen3 qwen3_moe
    smollm3 stablelm starcoder2
    """.split()  # noqa: SIM905
)
"""Families whose logits under AutoTP equal the whole model's: tests/backend/compute/test_load.py shows each."""

_UNSHARDABLE = {
    "phi3": "it takes its fused projections apart by the counts of the whole model",
    "olmo2": "it normalises queries and keys over all heads, which no rank has",
    "gpt2": "DeepSpeed has no rule for its transposed layers",
}

_NO_INTERFACE = {
    "bloom": "its positions (ALiBi) bypass transformers' attention interface",
    "falcon": "its attention bypasses transformers' attention interface",
    "codegen": "its attention bypasses transformers' attention interface",
    "gptj": "its attention bypasses transformers' attention interface",
    "mpt": "its positions (ALiBi) bypass transformers' attention interface",
}


def check_family(checkpoint: Checkpoint, tensor_parallel: int) -> None:
    """LoadError unless this kind of model can be served on so many ranks with the right result."""
    family = checkpoint.model_type
    require(bool(family), f"{checkpoint.folder / 'config.json'} has no model_type")
    named = checkpoint.architectures
    require(
        not named or any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in named),
        f"{family}: {', '.join(named)} is not a causal language model",
    )
    if reason := _NO_INTERFACE.get(family) or refusal(checkpoint.config):
        raise LoadError(f"{family} cannot be served: {reason}")
    if tensor_parallel > 1 and family not in SHARDABLE:
        reason = _UNSHARDABLE.get(family, "it has not been shown that DeepSpeed shards it correctly")
        raise LoadError(f"{family} cannot be split over {tensor_parallel} ranks: {reason}; use tensor_parallel 1")


@dataclass(frozen=True)
class Geometry:
    """Counts of the attention, from the tensors' shapes where they show them: configs may leave defaults out."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    @values_of("config.json")
    def of(cls, checkpoint: Checkpoint) -> Geometry:
        config = checkpoint.text_config
        heads = _number(config, "num_attention_heads", "n_head", "num_heads")
        layers = _number(config, "num_hidden_layers", "n_layer", "num_layers")
        queries, keys = (_rows(checkpoint, f"{part}_proj.weight") for part in "qk")
        hidden = _number(config, "hidden_size", "n_embd", "d_model")
        head_dim = queries // heads if queries else int(config.get("head_dim") or hidden // heads)
        require(head_dim > 0, "config.json gives its attention heads no width (head_dim, or hidden_size)")
        kv_heads = keys // head_dim if keys else int(config.get("num_key_value_heads") or heads)
        return cls(layers, heads, kv_heads, head_dim)


def _number(config: dict[str, Any], *names: str) -> int:
    for name in names:
        if isinstance(config.get(name), int) and config[name] > 0:
            return int(config[name])
    raise LoadError(f"config.json has no {names[0]}")


def _rows(checkpoint: Checkpoint, ending: str) -> int:
    """Output rows of the first projection whose name ends so; 0 if there is none."""
    shapes = (tensor.shape for name, tensor in checkpoint.tensors.items() if name.endswith(ending))
    return next((shape[0] for shape in shapes if shape), 0)


def share_heads(checkpoint: Checkpoint, ranks: int) -> tuple[int, ...]:
    """Count the key/value heads of each rank; the first ranks hold one more where they do not divide evenly.

    LoadError if a rank would have none. Source: deepspeed.module_inject.tp_shard.
    """
    geometry = Geometry.of(checkpoint)
    if geometry.kv_heads < ranks:
        raise LoadError(
            f"tensor_parallel {ranks} is more than the model's {geometry.kv_heads} key/value heads"
            f" ({geometry.heads} query heads); use at most {geometry.kv_heads}"
        )
    each, more = divmod(geometry.kv_heads, ranks)
    return tuple(each + (rank < more) for rank in range(ranks))


def dtype_name(config: EngineConfig, checkpoint: Checkpoint, device: str) -> str:
    """The configured type; auto is the checkpoint's on CUDA and float32 on CPU."""
    if config.dtype != "auto":
        return config.dtype
    return checkpoint.dtype if device == "cuda" else "float32"
