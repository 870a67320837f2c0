"""Quality: how far a model with packed weights is from the same model in full; it knows nothing of speed."""

from __future__ import annotations

import argparse
import math
import pydoc_data.topics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from backend import samples
from backend.compute.encoders.load import load_encoder
from backend.compute.load import load
from backend.compute.quantized.scheme import scheme_of
from backend.compute.tensor_parallel import connect
from backend.config import EngineConfig
from backend.model_folder import Checkpoint

WINDOW = 512
"""Tokens that see each other."""
PROMPTS = (
    "The capital of France is",
    "Water boils at",
    "Once upon a time, in a small village,",
    "def fibonacci(n):",
    "The three primary colours are",
    "Photosynthesis is the process by which",
    "Dear customer, thank you for",
    "In 1969, the first",
    "A list of fruits: apple,",
    "The opposite of hot is",
)
TOKENS = 32
"""Of each greedy text."""


def text(size: int = 20_000) -> str:
    """Python's own reference, topic after topic in their names' order."""
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics)).encode()[:size].decode(errors="ignore")


def config_of(folder: Path, form: str, **more: Any) -> EngineConfig:
    kind, *rest = form.split(":")
    given = {"model": str(folder), "quantization": kind} | dict(each.split("=", 1) for each in rest)
    return EngineConfig.from_parameters(given | more)


def generator(folder: Path, form: str, device: torch.device, dtype: torch.dtype) -> Any:
    return load(config_of(folder, form), 0, 1, device, dtype, attention="eager")


@torch.inference_mode()
def perplexity(model: Any, ids: Tensor) -> float:
    """Of token ids [n], each window by itself."""
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, WINDOW):
        part = ids[start : start + WINDOW + 1].to(model.device)
        logits = model(part[None, :-1], use_cache=False).logits[0].float()
        total += float(torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum"))
        count += len(part) - 1
    return math.exp(total / count)


@torch.inference_mode()
def greedy(model: Any, tokenizer: Any, prompts: int = len(PROMPTS), tokens: int = TOKENS) -> list[list[int]]:
    """The tokens after each prompt."""
    found = []
    for prompt in PROMPTS[:prompts]:
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        found.append(made[0, ids.shape[1] :].tolist())
    return found


@torch.inference_mode()
def vectors(folder: Path, form: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Means of the last hidden states of the text's paragraphs.  # [paragraphs, hidden]"""
    scheme = scheme_of(config_of(folder, form))
    model = load_encoder(Checkpoint.open(folder), "AutoModel", 1, device, dtype, scheme)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for paragraph in [each for each in text(8_000).split("\n\n") if len(each) > 80][:24]:
        given = tokenizer(paragraph, return_tensors="pt", truncation=True, max_length=128).to(device)
        found.append(model(**given).last_hidden_state[0].float().mean(0))
    return torch.nn.functional.normalize(torch.stack(found), dim=-1)


def same(first: list[list[int]], second: list[list[int]]) -> tuple[int, int]:
    """Texts that are equal, and tokens before the first difference, all texts together."""
    pairs = list(zip(first, second, strict=True))
    agreed = sum(
        next((at for at, (one, other) in enumerate(zip(a, b, strict=False)) if one != other), min(len(a), len(b)))
        for a, b in pairs
    )
    return sum(a == b for a, b in pairs), agreed


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    connect(0, 1, device, tempfile.mkdtemp())
    parts, forms = options.parts.split(","), options.forms.split(",")
    if "perplexity" in parts or "greedy" in parts:
        folder = Path(options.model) if options.model else samples.fetch("generate")
        _generate(folder, forms, parts, options.bytes, device, dtype)
    if "embed" in parts:
        folder = Path(options.embed_model) if options.embed_model else samples.fetch("embed")
        full = vectors(folder, "", device, dtype)
        for form in forms:
            cosines = (vectors(folder, form, device, dtype) * full).sum(-1)
            print(f"embed {form}: cosine {cosines.min():.5f} at least, {cosines.mean():.5f} on average", flush=True)


def _generate(
    folder: Path, forms: list[str], parts: list[str], size: int, device: torch.device, dtype: torch.dtype
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text(size), return_tensors="pt").input_ids[0]
    usual = 0.0
    texts: list[list[int]] = []
    for form in ["", *forms]:
        model, name = generator(folder, form, device, dtype), form or str(dtype).removeprefix("torch.")
        if "perplexity" in parts:
            found = perplexity(model, ids)
            usual = usual or found
            print(f"perplexity {name}: {found:.4f}, {found / usual - 1:+.2%} ({len(ids)} tokens)", flush=True)
        if "greedy" in parts:
            made = greedy(model, tokenizer)
            texts = texts or made
            if form:
                _tell(name, texts, made, tokenizer)


def _tell(name: str, before: list[list[int]], now: list[list[int]], tokenizer: Any) -> None:
    equal, agreed = same(before, now)
    whole = sum(map(len, before))
    print(f"greedy {name}: {equal} of {len(now)} texts equal, {agreed} of {whole} tokens before a first difference")
    for prompt, old, new in zip(PROMPTS, before, now, strict=True):
        if old != new:
            print(f"  {prompt!r}\n    {tokenizer.decode(old)!r}\n    {tokenizer.decode(new)!r}", flush=True)
