"""A model that another library has loaded, split among the ranks in place; not who calls it.

As `load_encoder` does, with the loaded tensors in place of the checkpoint's: DeepSpeed splits the empty model, and each
parameter gets its rank's part.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from backend.compute.encoders.load import hide, share, show
from backend.compute.load import put, restore
from backend.compute.sharding import check_shards, shard, spans
from backend.compute.weights import Span
from backend.errors import LoadError

SPLITTABLE = ("CLIPModel", "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
"""Classes whose answers on several ranks equal the whole model's: tests/backend/compute/test_split_loaded.py."""

TABLE = "relative_attention_bias"
"""What T5 adds to the scores of each head."""


def unsplittable(model: nn.Module, world: int) -> str:
    """Why a model cannot be split among so many ranks; empty if it can."""
    if type(model).__name__ not in SPLITTABLE:
        return f"no test shows that a split {type(model).__name__} equals a whole one"
    config = model.config
    parts = [getattr(config, name) for name in ("text_config", "vision_config") if hasattr(config, name)] or [config]
    heads = sorted({int(part.num_attention_heads) for part in parts})
    odd = next((each for each in heads if each % world), None)
    return f"{world} ranks cannot share its {odd} attention heads" if odd else ""


def split(model: PreTrainedModel, rank: int, world: int, device: torch.device) -> None:
    """Leave this rank's part of the model, on `device`; all ranks call it. Ask `unsplittable` first."""
    whole = {name: value.detach() for name, value in model.state_dict().items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    dtypes = {name: value.dtype for name, value in model.named_parameters(remove_duplicate=False)}
    tied = dict(model.all_tied_weights_keys)
    model.requires_grad_(False).to_empty(device="meta")
    hidden, tables = hide(model), _hide_tables(model)
    shard(model, world, device, model.dtype)
    show(model, hidden, device)
    for name, table in tables.items():
        put(model, name, nn.Embedding(table.num_embeddings, table.embedding_dim // world, device=device))
    restore(model, buffers, dtypes, device)
    share(model, tied)
    check_shards(model, world)
    _fill(model, whole, rank)
    model.eval()


def _hide_tables(model: nn.Module) -> dict[str, nn.Embedding]:
    """Take what T5 adds to each head's scores out of DeepSpeed's sight: a rank needs its heads' columns of it."""
    named = model.named_modules()
    tables = {name: each for name, each in named if isinstance(each, nn.Embedding) and name.endswith(TABLE)}
    for name in tables:
        put(model, name, nn.Identity())
    return tables


def _fill(model: nn.Module, whole: dict[str, Tensor], rank: int) -> None:
    parts = spans(model, False)
    for name, place in model.state_dict().items():
        span = parts[name]
        if name.endswith(f"{TABLE}.weight"):
            width = place.shape[1]
            span = Span(1, rank * width, (rank + 1) * width)
        part = span.of(whole[name])
        if part.shape != place.shape:
            raise LoadError(f"{name!r}: the part for this rank is {list(part.shape)}, its place {list(place.shape)}")
        place.copy_(part)
