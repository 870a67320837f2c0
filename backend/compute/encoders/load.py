"""A checkpoint as one rank's encoder with its task's head; it does not know what the outputs mean.

As `load`, with one difference: linear layers outside the repeated blocks (poolers, heads) stay whole on every rank.
"""

from __future__ import annotations

import re

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from backend.compute import fused
from backend.compute.load import build, fill, own_dtypes, put, restore, tie
from backend.compute.offload.offload import Offload
from backend.compute.quantized.checkpoints.schemes import schemes
from backend.compute.quantized.packed import Scheme
from backend.compute.quantized.replace import replace
from backend.compute.sharding import allocate, check_split, in_blocks, spans, split
from backend.compute.weights import Reader, Recipe, recipes
from backend.encoders import check_task
from backend.model_folder import Checkpoint

_HEADS = re.compile(r"(^|\.)(cls|lm_head|pooler|classifier|qa_outputs|score|predictions|vocab_\w+|generator_\w+)\.")
"""Heads of other purposes that checkpoints carry along: they may stay unused."""


def load_encoder(
    checkpoint: Checkpoint,
    auto: str,
    world: int,
    device: torch.device,
    dtype: torch.dtype,
    scheme: Scheme | None = None,
    offload: Offload | None = None,
) -> PreTrainedModel:
    """Load this rank's shard of what transformers' class `auto` makes of the folder, in `dtype` on `device`.

    `scheme`: how the linear layers of the repeated blocks are packed; None: not at all. `offload` holds the layers, if
    it is there.

    `connect` must have been called. LoadError, of one line, for anything that would not give exactly the checkpoint's
    model.
    """
    check_task(checkpoint, world)
    held = torch.device("meta") if offload else device
    model = build(checkpoint, getattr(transformers, auto), dtype, None)
    with Reader(checkpoint) as reader:
        wanted = recipes(model, checkpoint, optional=lambda name: bool(_HEADS.search(name)))
        packing = schemes(model, wanted, checkpoint, scheme)
        _drop_pooler(model, wanted)
        tied = _tied(model, wanted, reader)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        dtypes = own_dtypes(model, dtype)
        hidden = hide(model)
        split(model, world, dtype)
        if packing:
            replace(model, packing, dtypes, held)
        allocate(model, held)
        show(model, hidden, held)
        check_split(model, world)
        restore(model, buffers, dtypes, device)
        share(model, tied)
        parts = {name: span for name, span in spans(model, False).items() if name not in tied}
        if fused.pays(device, dtype):
            fused.merge(model)
        if offload:
            offload.allocate(model)
        fill(model, wanted, parts, reader, offload.watched(lambda share: None) if offload else lambda share: None)
    if offload:
        offload.start()
    return model


def _drop_pooler(model: PreTrainedModel, wanted: dict[str, Recipe]) -> None:
    """Encoders for embeddings are often saved without one; the output does not depend on it."""
    base = model.base_model
    pooler = getattr(base, "pooler", None)
    if base is model and isinstance(pooler, nn.Module) and not any(name.startswith("pooler.") for name in wanted):
        put(base, "pooler", None)


def _tied(model: PreTrainedModel, wanted: dict[str, Recipe], reader: Reader) -> dict[str, str]:
    """Parameters that share another one's tensor, and that one's name."""
    stated = dict(model.all_tied_weights_keys)
    return {name: source for name, source in stated.items() if tie(name, source, wanted, reader)}


def share(model: PreTrainedModel, tied: dict[str, str]) -> None:
    for name, source in tied.items():
        put(model, name, model.get_parameter(source))


def hide(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Take linear layers outside the repeated blocks out of DeepSpeed's sight."""
    blocks = set(map(id, in_blocks(model)))
    hidden: dict[str, nn.Module] = {
        name: module for name, module in model.named_modules() if type(module) is nn.Linear and id(module) not in blocks
    }
    for name in hidden:
        put(model, name, nn.Identity())
    return hidden


def show(model: PreTrainedModel, hidden: dict[str, nn.Module], device: torch.device) -> None:
    for name, module in hidden.items():
        put(model, name, module.to_empty(device=device))
