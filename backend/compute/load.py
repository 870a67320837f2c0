"""A checkpoint as one rank's module: built empty, sharded by DeepSpeed, filled from slices; not what it computes.

Every parameter is filled exactly once and every tensor used, or the load fails with its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from backend.checkpoint import check_family, share_heads
from backend.compute import fused
from backend.compute.attention.families import freeze_rope, unsupported
from backend.compute.attention.paged import NAME, register
from backend.compute.offload.offload import Offload
from backend.compute.quantized.checkpoints.schemes import idle_bias, schemes
from backend.compute.quantized.layer import packed_weights
from backend.compute.quantized.packed import Packed
from backend.compute.quantized.replace import replace
from backend.compute.quantized.scheme import scheme_of
from backend.compute.sharding import allocate, check_shards, spans, split
from backend.compute.tensor_parallel import VocabParallelHead
from backend.compute.weights import WHOLE, Reader, Recipe, Span, recipes
from backend.config import EngineConfig
from backend.errors import LoadError
from backend.model_folder import Checkpoint, resolve, root

Progress = Callable[[float], None]


def load(
    config: EngineConfig,
    rank: int,
    world: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress = lambda share: None,
    attention: str = NAME,
    merge: bool | None = None,
    offload: Offload | None = None,
) -> PreTrainedModel:
    """Load this rank's shard of the model, in `dtype` on `device`, ready for inference.

    `connect` must have been called. `progress` gets the share of the weights read, 0 to 1. `attention` is a name in
    transformers' AttentionInterface. `merge`: whether sibling projections become one product; None where it pays.
    `offload` holds the layers, if it is there.
    LoadError, of one line, for anything that would not give exactly the model of the checkpoint.
    """
    held = torch.device("meta") if offload else device
    checkpoint = Checkpoint.open(resolve(config.model, root()))
    check_family(checkpoint, world)
    share_heads(checkpoint, world)
    model = _empty(checkpoint, dtype, attention)
    with Reader(checkpoint) as reader:
        wanted = recipes(model, checkpoint, optional=lambda name: idle_bias(name, reader))
        scheme = schemes(model, wanted, checkpoint, scheme_of(config))
        name, head, tied = _split_head(model, wanted, reader, rank, world)
        buffers, dtypes = {name: buffer.clone() for name, buffer in model.named_buffers()}, own_dtypes(model, dtype)
        put(model, name, nn.Identity())  # out of DeepSpeed's sight, which would split it by its input
        split(model, world, dtype)
        if scheme:
            replace(model, scheme, dtypes, held)
        allocate(model, held)
        restore(model, buffers, dtypes, device)
        _place_head(model, name, head, tied, held)
        check_shards(model, world)
        parts = spans(model, tied)
        if fused.pays(device, dtype) if merge is None else merge:
            fused.merge(model)
        if offload:
            offload.allocate(model)
            progress = offload.watched(progress)
        fill(model, wanted, parts, reader, progress)
    if offload:
        offload.start()
    return model


def _empty(checkpoint: Checkpoint, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """Build the causal language model with parameters on the meta device and buffers that are real."""
    if attention == NAME:
        register()

    def check(config: Any) -> None:
        if attention == NAME and (reason := unsupported(config)):
            raise LoadError(f"{checkpoint.model_type} cannot be served: {reason}")

    model = build(checkpoint, AutoModelForCausalLM, dtype, attention, check)
    if model._is_stateful:
        raise LoadError(f"{checkpoint.model_type} cannot be served: it has recurrent layers")
    freeze_rope(model)
    return model


def build(
    checkpoint: Checkpoint,
    auto: Any,
    dtype: torch.dtype,
    attention: str | None,
    check: Callable[[Any], None] = lambda config: None,
) -> PreTrainedModel:
    """Build what one of transformers' Auto classes makes of the folder's configuration: parameters on the meta device,
    buffers real. `check` sees the configuration first.
    """
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True, trust_remote_code=False)
        check(config)
        with init_empty_weights(include_buffers=False):
            model = auto.from_config(config, dtype=dtype, attn_implementation=attention)
    except (ValueError, ImportError, OSError, KeyError, TypeError) as error:
        raise LoadError(f"{checkpoint.model_type} cannot be built: {_line(error)}") from None
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.eval()
    assert isinstance(model, PreTrainedModel)
    return model


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _split_head(
    model: PreTrainedModel, wanted: dict[str, Recipe], reader: Reader, rank: int, world: int
) -> tuple[str, VocabParallelHead, bool]:
    """Return the output head's name, ours for it, and whether it shares the embedding's weight."""
    old = model.get_output_embeddings()
    if not isinstance(old, nn.Linear):
        raise LoadError(f"{type(model).__name__} has no linear output head")
    vocab, hidden = old.weight.shape
    head = VocabParallelHead(vocab, hidden, old.bias is not None, rank, world, old.weight.dtype)
    name = next(name for name, module in model.named_modules() if module is old)
    ties = dict(model.all_tied_weights_keys)
    source = ties.pop(f"{name}.weight", None)
    if ties:
        raise LoadError(f"{type(model).__name__} ties {', '.join(sorted(ties))}, which is not supported")
    return name, head, source is not None and tie(f"{name}.weight", source, wanted, reader)


def tie(head: str, embedding: str, wanted: dict[str, Recipe], reader: Reader) -> bool:
    """Whether they are tied, by what the checkpoint holds, as from_pretrained does: two different tensors are not."""
    if head not in wanted:
        return True
    if embedding not in wanted:
        wanted[embedding] = wanted.pop(head)
        return True
    first, second = (reader.part(wanted[name].names[0]) for name in (head, embedding))
    if not torch.equal(first, second):
        return False
    del wanted[head]
    return True


def own_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Note each parameter's own dtype: some are made in another, some are kept in fp32 for their family's sake."""
    plan = model._get_dtype_plan(dtype)
    kept = build_glob_alternation(list(plan))[0] if plan else None
    return {
        name: torch.float32 if kept is not None and kept.search(name) else parameter.dtype
        for name, parameter in model.named_parameters()
    }


def restore(
    model: nn.Module, buffers: dict[str, torch.Tensor], dtypes: dict[str, torch.dtype], device: torch.device
) -> None:
    """Give buffers their values and parameters their dtypes, as they were before DeepSpeed."""
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer.to(device)
    for name, parameter in list(model.named_parameters()):
        if parameter.dtype != dtypes[name]:
            owner, _, leaf = name.rpartition(".")
            kept = nn.Parameter(torch.empty_like(parameter, dtype=dtypes[name]), requires_grad=False)
            setattr(model.get_submodule(owner), leaf, kept)


def _place_head(model: PreTrainedModel, name: str, head: VocabParallelHead, tied: bool, device: torch.device) -> None:
    put(model, name, head.to_empty(device=device))
    if tied:
        weight = model.get_input_embeddings().weight
        assert isinstance(weight, nn.Parameter)
        head.tie(weight)


def fill(
    model: PreTrainedModel,
    wanted: dict[str, Recipe],
    parts: dict[str, Span],
    reader: Reader,
    progress: Progress = lambda share: None,
) -> None:
    """Copy every recipe's part into its parameter; LoadError names what does not match, and what is left unfilled."""
    all_places: dict[str, torch.Tensor | Packed] = {**model.state_dict(), **packed_weights(model)}
    places = {name: value for name, value in all_places.items() if name in parts}
    size = {target: sum(reader.checkpoint.tensors[name].bytes for name in wanted[target].names) for target in wanted}
    done, total = 0, sum(size.values())
    for target, recipe in wanted.items():
        for name, value in _values(target, recipe, parts, reader, model):
            if name not in places:
                raise LoadError(f"{name!r} is made twice by the checkpoint, or has no place in {type(model).__name__}")
            _copy(name, places.pop(name), value)
        done += size[target]
        progress(done / total)
    if places:
        raise LoadError(f"the checkpoint has no tensor for {', '.join(sorted(places)[:4])} ({len(places)} in all)")
    if hollow := [name for name, value in model.state_dict().items() if value.is_meta]:
        raise LoadError(f"{hollow[0]!r} was never allocated")


def _values(
    target: str, recipe: Recipe, parts: dict[str, Span], reader: Reader, model: PreTrainedModel
) -> Iterator[tuple[str, torch.Tensor | Packed]]:
    if recipe.converter is None:
        yield target, reader.value(recipe.names[0], parts.get(target, WHOLE))
        return
    for name, whole in reader.make(target, recipe, model).items():
        yield name, parts.get(name, WHOLE).of(whole)


def _copy(name: str, place: torch.Tensor | Packed, value: torch.Tensor | Packed) -> None:
    if tuple(place.shape) != tuple(value.shape):
        raise LoadError(f"{name!r}: the part for this rank is {list(value.shape)}, its place {list(place.shape)}")
    if value.dtype.is_floating_point != place.dtype.is_floating_point or value.dtype.itemsize < 2:
        raise LoadError(f"{name!r} is stored as {value.dtype}, which cannot become {place.dtype}")
    if isinstance(value, Packed):
        place.take(value) if isinstance(place, Packed) else place.copy_(value.full())
    elif isinstance(place, Packed):
        place.fill(value)
    else:
        place.copy_(value)


def put(model: nn.Module, name: str, module: nn.Module | nn.Parameter | None) -> None:
    """Replace what is called so, a module or a parameter."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, module)
