"""Shape: a decoder's sizes, and folders of random weights in such a shape. It does not know who loads them.

Weights are drawn on the GPU where there is one, a shard a thread, and written as safetensors without a model around
them: 16 GB take seconds, where building a model and saving it takes minutes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHARD_BYTES = 1 << 30
WRITERS = 8
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder with gated layers (Llama and its like)."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = True
    longest: int = 8192
    """Tokens."""

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def layer_parameters(self) -> int:
        """Of all layers' matrices together."""
        attention = 2 * self.hidden * self.heads * self.head_dim + 2 * self.hidden * self.kv_heads * self.head_dim
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_parameters(self) -> int:
        return self.hidden * self.vocab

    @property
    def kv_elements(self) -> int:
        """Keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @classmethod
    def of(cls, folder: Path | str) -> Shape:
        """As a folder's config.json states it."""
        config = json.loads((Path(folder) / "config.json").read_text())
        heads = config["num_attention_heads"]
        return cls(
            config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"], heads,
            config.get("num_key_value_heads") or heads, config["vocab_size"],
            bool(config.get("tie_word_embeddings")), config.get("max_position_embeddings", 8192),
        )  # fmt: skip


SHAPES = {
    "llama-3.1-70b": Shape(8192, 28672, 80, 64, 8, 128256, tied=False),
    "llama-3.1-8b": Shape(4096, 14336, 32, 32, 8, 128256, tied=False),
    "llama-3.2-3b": Shape(3072, 8192, 28, 24, 8, 128256),
    "llama-3.2-1b": Shape(2048, 8192, 16, 32, 8, 128256),
    "tiny": Shape(64, 128, 2, 4, 2, 49152),
}


def make_shape(name: str, tokenizer: Path | str | None = None) -> Path:
    """The folder of a checkpoint of random bf16 weights, written once; with somebody else's tokenizer if given."""
    folder = Path(os.environ.get("TRITONSPEED_CACHE", ROOT / ".cache")) / "shapes" / name
    if not (folder / "config.json").exists():  # written last
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write(SHAPES[name], folder)
    for file in TOKENIZER_FILES if tokenizer else ():
        if not (folder / file).exists():
            shutil.copy(Path(str(tokenizer)) / file, folder)
    return folder


def write(shape: Shape, folder: Path) -> None:
    """Shards, their index and config.json."""
    config, tensors = _described(shape)
    shards = list(_shards(tensors))
    names = [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
    with ThreadPoolExecutor(WRITERS) as writers:
        jobs = [
            writers.submit(_write_shard, folder / name, shard, seed)
            for seed, (name, shard) in enumerate(zip(names, shards, strict=True))
        ]
        for job in jobs:
            job.result()
    places = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    size = sum(2 * count(dims) for dims in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    _let_go()


def _let_go() -> None:
    """Of the device's memory, which is all another process's from now on."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _described(shape: Shape) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """Transformers' configuration, and the tensors of a checkpoint by name."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, vocab_size=shape.vocab,
        tie_word_embeddings=shape.tied, max_position_embeddings=shape.longest,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with torch.device("meta"):
        state = LlamaForCausalLM(config).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    if shape.tied:
        shapes.pop("lm_head.weight", None)
    return config, shapes


def _shards(tensors: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Tensors in their order, cut where a shard is full."""
    shard: dict[str, tuple[int, ...]] = {}
    for name, dims in tensors.items():
        shard[name] = dims
        if sum(2 * count(each) for each in shard.values()) >= SHARD_BYTES:
            yield shard
            shard = {}
    if shard:
        yield shard


def count(dims: tuple[int, ...]) -> int:
    total = 1
    for each in dims:
        total *= each
    return total


def _write_shard(file: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    """The safetensors format: 8 bytes of the header's length, the header, the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dims in shapes.items():
        end = offset + 2 * count(dims)
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb", buffering=0) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for values in _drawn(shapes, seed):
            left = values
            while len(left):  # one call writes 2 GiB at the most
                left = left[out.write(left) :]


def _drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> Iterator[memoryview]:
    """Each tensor's bytes: ones for norms, N(0, 0.02) for the rest, which is how transformers begins a Llama."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chance = torch.Generator(device).manual_seed(seed)
    for name, dims in shapes.items():
        made = torch.ones(dims, dtype=torch.bfloat16, device=device)
        if "norm" not in name:
            made.normal_(0, 0.02, generator=chance)
        yield memoryview(made.cpu().view(torch.int16).numpy()).cast("B")  # type: ignore[arg-type]
