"""Fit: whether a model fits this machine's devices, and what each part of it will take of their memory.

It decides from files and counts alone, before any process is started; torch is never imported. What the ranks then
really take they say themselves once they are loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from backend import held
from backend.checkpoint import Geometry, check_family, dtype_name, share_heads
from backend.config import EngineConfig
from backend.devices import KV_CACHE_FRACTION, MICRO_BATCH_TOKENS, gib, resolved
from backend.devices import free_gpu_memory as _gpu_memory
from backend.devices import free_host_memory as _host_memory
from backend.errors import LoadError, require
from backend.json_file import values_of
from backend.model_folder import Checkpoint, Tensor, longest_text, resolve, root, stored
from backend.quantized_form import check_asked, kind_of
from backend.tasks.pipeline_folder import PipelineFolder

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
SCALE = 4
"""Bytes of a symmetric group's scale (float32)."""

_GIB = 1 << 30
_LIBRARIES = {"cpu": int(0.5 * _GIB), "cuda": _GIB}
"""Bytes a rank takes beside the model: interpreter and libraries; on CUDA the context."""
_GRAPHS = 64 << 20
"""Bytes of the CUDA graphs, beside their largest one's tensors: they share one pool."""
_SAMPLED = 20
"""Bytes of each logit in the way of sampling that takes most: sorted values, indices and sums beside the logits."""

_REPEATED = re.compile(r"\.\d+\.")
_NOT_LINEAR = ("embed", ".experts.", "wte", "wpe", "bias_table")


@dataclass(frozen=True)
class Fit:
    """What serving a model takes, in bytes, of the rank that takes most."""

    model_type: str
    device: str
    dtype: str
    ranks: int
    free: int
    """What a rank may take now."""
    weights: int
    step: int
    """Activations of the largest step, and what sampling from it takes."""
    graphs: int = 0
    quantization: str = ""
    heads: tuple[int, ...] = ()
    """Key/value heads of each rank, of a model that generates."""
    kv_token: int = 0
    """One token's keys and values."""
    kv_tokens: int = 0
    """Tokens that the KV cache will hold."""
    max_model_len: int = 0
    moved: int = 0
    """Weights that come from host memory or disk in each step."""

    @property
    def libraries(self) -> int:
        return _LIBRARIES[self.device]

    @property
    def needed(self) -> int:
        """All but the KV cache, which takes of what is left."""
        return self.weights + self.step + self.graphs + self.libraries

    @property
    def peak(self) -> int:
        return self.needed + self.kv_token * self.kv_tokens

    def report(self) -> list[str]:
        """Lines for people."""
        kind = f"{self.dtype}, {self.quantization} weights" if self.quantization else self.dtype
        heads = f", key/value heads {'+'.join(map(str, self.heads))}" if self.heads else ""
        parts = [
            f"weights {gib(self.weights)}",
            f"largest step {gib(self.step)}",
            *([f"CUDA graphs {gib(self.graphs)}"] if self.graphs else []),
            f"libraries {gib(self.libraries)}",
            *([f"KV cache {gib(self.kv_token * self.kv_tokens)}"] if self.kv_token else []),
        ]
        lines = [
            f"{self.model_type}: {self.ranks} x {self.device}, {kind}{heads}",
            f"each rank: {', '.join(parts)}: {gib(self.peak)} of {gib(self.free)} free",
        ]
        if self.moved:
            lines.append(f"offload: {gib(self.moved)} of weights come to each rank's device in a step")
        if self.kv_token:
            lines.append(f"KV cache: {self.kv_tokens} tokens, {self.kv_token} bytes a token and rank")
            lines.append(f"longest text: {self.max_model_len} tokens")
        return lines


@values_of("config.json")
def check(config: EngineConfig, task: str = "generate") -> Fit:
    """Fit, or a LoadError of one line that says what does not fit."""
    folder = resolve(config.model, root())
    if task == "text_to_image":
        fit = _of_images(config, folder)
    elif task == "generate":
        return _of_generate(config, Checkpoint.open(folder))
    else:
        fit = _of_encoder(config, Checkpoint.open(folder))
    _check_memory(fit, 0)
    return fit


def _of_generate(config: EngineConfig, checkpoint: Checkpoint) -> Fit:
    check_family(checkpoint, config.tensor_parallel)
    geometry = Geometry.of(checkpoint)
    heads = share_heads(checkpoint, config.tensor_parallel)
    device, free = _devices(config)
    dtype = dtype_name(config, checkpoint, device)
    machine, item = resolved(config), ITEMSIZE[dtype]
    weights, moved = _weights(checkpoint, config, device, item, heads[0] / sum(heads))
    wide = _activations(checkpoint, item, config.tensor_parallel)
    logits = config.max_sequences * checkpoint.vocab_size
    graphs = 0
    if device == "cuda" and machine.cuda_graphs:
        graphs = _GRAPHS + (config.max_sequences + machine.step_tokens) * wide + 2 * logits * item
    step = machine.step_tokens * wide + (logits * _SAMPLED if device == "cuda" else 0)
    kept = 1 if config.kv_cache_dtype == "fp8" else item
    kv_token = 2 * geometry.layers * heads[0] * geometry.head_dim * kept
    kv_tokens = _kv_tokens(config, device, free - weights - step - graphs - _LIBRARIES[device], kv_token)
    length = min(longest_text(config.max_model_len, checkpoint.max_model_len), kv_tokens)
    fit = Fit(
        checkpoint.model_type, device, dtype, len(heads), free, weights, step, graphs,
        config.quantization or kind_of(checkpoint), heads, kv_token, min(kv_tokens, config.max_sequences * length),
        length, moved,
    )  # fmt: skip
    _check_memory(fit, config.num_blocks * config.block_size or config.block_size)
    require(
        kv_tokens >= max(config.max_model_len, config.block_size),
        f"the KV cache would hold {kv_tokens} tokens, max_model_len is {config.max_model_len}: lower it, or raise"
        " kv_cache_fraction",
    )
    return fit


def _of_encoder(config: EngineConfig, checkpoint: Checkpoint) -> Fit:
    device, free = _devices(config)
    dtype = dtype_name(config, checkpoint, device)
    item, ranks = ITEMSIZE[dtype], config.tensor_parallel
    weights, moved = _weights(checkpoint, config, device, item, 1 / ranks)
    tokens = config.step_tokens or MICRO_BATCH_TOKENS[device]
    step = tokens * _activations(checkpoint, item, ranks)
    kind = config.quantization or kind_of(checkpoint)
    return Fit(checkpoint.model_type, device, dtype, ranks, free, weights, step, 0, kind, moved=moved)


def _of_images(config: EngineConfig, folder: Path) -> Fit:
    """Every rank holds the whole pipeline. A step is the decoding of one image of the size that it was made for."""
    device, free = _devices(config)
    dtype = config.dtype if config.dtype != "auto" else "float16" if device == "cuda" else "float32"
    weights = sum(tensor.numel for tensor in stored(folder)) * ITEMSIZE[dtype]
    pipeline = PipelineFolder.open(folder)
    step = pipeline.side**2 * _PIXEL * ITEMSIZE[dtype]
    return Fit(pipeline.kind, device, dtype, config.tensor_parallel, free, weights, step)


_PIXEL = 256
"""Values of a pixel in a VAE's widest layer, its input and its output."""


def _weights(
    checkpoint: Checkpoint, config: EngineConfig, device: str, itemsize: int, attention: float
) -> tuple[int, int]:
    """What the first rank's device holds, and what it gets each step from elsewhere, for which there must be room."""
    check_asked(checkpoint, config)
    weights, moved = held.split(_sizes(checkpoint.tensors.values(), config, itemsize, attention), config)
    if config.offload != "cpu":
        return weights, moved
    if device == "cpu":
        return weights + moved, moved
    free = _host_memory() // config.tensor_parallel
    require(moved <= free, f"offload cpu needs {gib(moved)} of host memory a rank and {gib(free)} is free")
    return weights, moved


def _sizes(tensors: Any, config: EngineConfig, itemsize: int, attention: float) -> Iterator[tuple[str, float]]:
    """Of the first rank: attention (its share) by heads, other matrices evenly, embeddings, experts, vectors whole."""
    for tensor in tensors:
        linear = len(tensor.shape) == 2 and not any(part in tensor.name for part in _NOT_LINEAR)
        own = attention if "attn" in tensor.name or "attention" in tensor.name else 1 / config.tensor_parallel
        packed = linear and (config.quantization or tensor.form) and _REPEATED.search(tensor.name)
        size = packed_bytes(tensor, config, itemsize) if packed else tensor.numel * itemsize
        yield tensor.name, size * (own if linear else 1.0)


def packed_bytes(tensor: Tensor, config: EngineConfig, itemsize: int) -> float:
    """Of a weight [N, K] as compute/quantized keeps it."""
    if tensor.form:
        return tensor.form.bytes(tensor.shape)
    rows, width = tensor.shape
    size = config.group or width
    if not size or not width or width % size:
        raise LoadError(
            f"{tensor.name} takes {width} columns, which groups of {size} do not divide (quantization_group)"
        )
    groups = width // size
    scales = SCALE if config.symmetric else 2 * itemsize
    return prod(tensor.shape) * (0.5 if config.quantization == "int4" else 1) + rows * groups * scales


@values_of("config.json")
def _activations(checkpoint: Checkpoint, itemsize: int, ranks: int) -> int:
    """Bytes a token: hidden states, their sum and norm, what the widest layer makes of them, and its product."""
    config = checkpoint.text_config
    hidden = int(config.get("hidden_size") or config.get("n_embd") or config.get("dim") or 0)
    inner = int(config.get("intermediate_size") or config.get("ffn_dim") or config.get("hidden_dim") or 4 * hidden)
    return itemsize * (4 * hidden + 3 * max(inner, hidden) // ranks)


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


def _kv_tokens(config: EngineConfig, device: str, free: int, kv_token: int) -> int:
    if config.num_blocks:
        return config.num_blocks * config.block_size
    share = config.kv_cache_fraction or KV_CACHE_FRACTION[device]
    return max(0, int(free * share / kv_token)) // config.block_size * config.block_size


def _check_memory(fit: Fit, least: int) -> None:
    """`least`: tokens that the KV cache must hold."""
    needed = fit.needed + least * fit.kv_token
    smaller = "use more ranks, a smaller dtype or quantization" + (" or fewer num_blocks" if fit.kv_token else "")
    require(
        needed <= fit.free,
        f"{fit.model_type} in {fit.dtype} needs {gib(needed)} a rank ({gib(fit.weights)} of it weights) and"
        f" {gib(fit.free)} is free: {smaller}",
    )
