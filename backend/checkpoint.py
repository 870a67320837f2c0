"""Whether a checkpoint can be served as configured, and what it will take: family, heads, devices, memory.

It decides from files and counts alone, before any process is started; torch is never imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

from backend.config import EngineConfig
from backend.devices import KV_CACHE_FRACTION
from backend.devices import free_gpu_memory as _gpu_memory
from backend.devices import free_host_memory as _host_memory
from backend.errors import LoadError
from backend.families import refusal
from backend.json_file import values_of
from backend.model_folder import Checkpoint, resolve, root

__all__ = [
    "SHARDABLE",
    "Checkpoint",
    "Fit",
    "check",
    "check_family",
    "dtype_name",
    "free_memory",
    "resolve",
    "root",
    "share_heads",
]

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

_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}

_GIB = 1 << 30
_OVERHEAD = {"cpu": int(0.5 * _GIB), "cuda": int(1.5 * _GIB)}
"""Bytes a rank takes beside weights and KV cache: interpreter and libraries, CUDA context and activations."""


@dataclass(frozen=True)
class Fit:
    """What serving a checkpoint takes, for the rank that takes most."""

    model_type: str
    device: str
    dtype: str
    ranks: int
    heads: tuple[int, ...]
    """Key/value heads of each rank."""
    weights: int
    """Bytes a rank holds."""
    kv_token: int
    """Bytes of one token's keys and values on one rank."""
    kv_tokens: int
    """Tokens that the KV cache will hold."""
    free: int
    """Bytes that a rank may take now."""
    max_model_len: int

    def report(self) -> list[str]:
        """Lines for people."""
        return [
            f"{self.model_type}: {self.ranks} x {self.device}, {self.dtype}, key/value heads {_join(self.heads)}",
            f"each rank: {_gib(self.weights)} of weights, {_gib(self.free)} free",
            f"KV cache: {self.kv_tokens} tokens, {self.kv_token} bytes a token and rank",
            f"longest text: {self.max_model_len} tokens",
        ]


def check(config: EngineConfig) -> Fit:
    """Fit, or a LoadError of one line that says what does not fit."""
    checkpoint = Checkpoint.open(resolve(config.model, root()))
    check_family(checkpoint, config.tensor_parallel)
    geometry = _Geometry.of(checkpoint)
    heads = share_heads(checkpoint, config.tensor_parallel)
    device, free = _devices(config)
    dtype = dtype_name(config, checkpoint, device)
    weights = _weight_bytes(checkpoint, heads, _ITEMSIZE[dtype])
    kv_token = 2 * geometry.layers * heads[0] * geometry.head_dim * _ITEMSIZE[dtype]
    kv_tokens = _kv_tokens(config, device, free - weights - _OVERHEAD[device], kv_token)
    length = _length(config, checkpoint, kv_tokens)
    fit = Fit(checkpoint.model_type, device, dtype, len(heads), heads, weights, kv_token, kv_tokens, free, length)
    _check_memory(fit, config)
    return fit


def check_family(checkpoint: Checkpoint, tensor_parallel: int) -> None:
    """LoadError unless this kind of model can be served on so many ranks with the right result."""
    family = checkpoint.model_type
    _check(bool(family), f"{checkpoint.folder / 'config.json'} has no model_type")
    _check("quantization_config" not in checkpoint.config, f"{family}: quantised checkpoints are not supported")
    named = checkpoint.architectures
    _check(
        not named or any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in named),
        f"{family}: {', '.join(named)} is not a causal language model",
    )
    if reason := _NO_INTERFACE.get(family) or refusal(checkpoint.config):
        raise LoadError(f"{family} cannot be served: {reason}")
    if tensor_parallel > 1 and family not in SHARDABLE:
        reason = _UNSHARDABLE.get(family, "it has not been shown that DeepSpeed shards it correctly")
        raise LoadError(f"{family} cannot be split over {tensor_parallel} ranks: {reason}; use tensor_parallel 1")


@dataclass(frozen=True)
class _Geometry:
    """Counts of the attention, from the tensors' shapes where they show them: configs may leave defaults out."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    @values_of("config.json")
    def of(cls, checkpoint: Checkpoint) -> _Geometry:
        config = checkpoint.text_config
        heads = _number(config, "num_attention_heads", "n_head", "num_heads")
        layers = _number(config, "num_hidden_layers", "n_layer", "num_layers")
        queries, keys = (_rows(checkpoint, f"{part}_proj.weight") for part in "qk")
        hidden = _number(config, "hidden_size", "n_embd", "d_model")
        head_dim = queries // heads if queries else int(config.get("head_dim") or hidden // heads)
        _check(head_dim > 0, "config.json gives its attention heads no width (head_dim, or hidden_size)")
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
    geometry = _Geometry.of(checkpoint)
    if geometry.kv_heads < ranks:
        raise LoadError(
            f"tensor_parallel {ranks} is more than the model's {geometry.kv_heads} key/value heads"
            f" ({geometry.heads} query heads); use at most {geometry.kv_heads}"
        )
    each, more = divmod(geometry.kv_heads, ranks)
    return tuple(each + (rank < more) for rank in range(ranks))


def _weight_bytes(checkpoint: Checkpoint, heads: tuple[int, ...], itemsize: int) -> int:
    """Bytes of the first rank: attention by heads, other matrices evenly, embeddings, experts and vectors whole."""
    ranks, attention = len(heads), heads[0] / sum(heads)
    total = 0.0
    for name, tensor in checkpoint.tensors.items():
        whole = len(tensor.shape) != 2 or "embed_" in name or ".experts." in name or ".wte." in name
        share = 1.0 if whole else attention if "attn" in name or "attention" in name else 1 / ranks
        total += tensor.numel * itemsize * share
    return ceil(total)


def dtype_name(config: EngineConfig, checkpoint: Checkpoint, device: str) -> str:
    """The configured type; auto is the checkpoint's on CUDA and float32 on CPU."""
    if config.dtype != "auto":
        return config.dtype
    return checkpoint.dtype if device == "cuda" else "float32"


def _devices(config: EngineConfig) -> tuple[str, int]:
    """Find the kind of device and the bytes that each of its ranks may take."""
    gpus = [] if config.device == "cpu" else _gpu_memory()
    if not gpus and config.device == "cuda":
        raise LoadError("device is cuda, but no NVIDIA GPU is visible")
    if not gpus:
        return "cpu", _host_memory() // config.tensor_parallel
    if len(gpus) < config.tensor_parallel:
        raise LoadError(f"tensor_parallel {config.tensor_parallel} needs as many GPUs; {len(gpus)} are visible")
    return "cuda", min(gpus[: config.tensor_parallel])


def free_memory(device: str) -> list[int]:
    """Free bytes of each GPU, or of the host as a list of one."""
    return _gpu_memory() if device == "cuda" else [_host_memory()]


def _kv_tokens(config: EngineConfig, device: str, free: int, kv_token: int) -> int:
    if config.num_blocks:
        return config.num_blocks * config.block_size
    share = config.kv_cache_fraction or KV_CACHE_FRACTION[device]
    return max(0, int(free * share / kv_token)) // config.block_size * config.block_size


def _length(config: EngineConfig, checkpoint: Checkpoint, kv_tokens: int) -> int:
    limit, asked = checkpoint.max_model_len, config.max_model_len
    _check(bool(limit or asked), "config.json names no maximum length: set max_model_len")
    _check(not limit or asked <= limit, f"max_model_len {asked} is more than the model's {limit} positions")
    return asked or min(limit, kv_tokens)


def _check_memory(fit: Fit, config: EngineConfig) -> None:
    cache = config.num_blocks * config.block_size * fit.kv_token
    needed = fit.weights + _OVERHEAD[fit.device] + max(cache, config.block_size * fit.kv_token)
    _check(
        needed <= fit.free,
        f"{fit.model_type} in {fit.dtype} needs {_gib(needed)} a rank ({_gib(fit.weights)} of it weights) and"
        f" {_gib(fit.free)} is free: use more ranks, a smaller dtype or fewer num_blocks",
    )
    _check(
        fit.kv_tokens >= max(config.max_model_len, config.block_size),
        f"the KV cache would hold {fit.kv_tokens} tokens, max_model_len is {config.max_model_len}: lower it, or raise"
        " kv_cache_fraction",
    )


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise LoadError(message)


def _join(numbers: tuple[int, ...]) -> str:
    return "+".join(map(str, numbers))


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"
