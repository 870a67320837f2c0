"""DeepSpeed's AutoTP on an empty model: running it, which part of each tensor a rank has, whether it all fits together.

It does not know where the tensors come from.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from backend.compute.quantized.layer import PackedLinear
from backend.compute.quantized.packed import Packed
from backend.compute.tensor_parallel import VocabParallelHead
from backend.compute.weights import WHOLE, Span
from backend.errors import LoadError


def shard(model: PreTrainedModel, world: int, device: torch.device, dtype: torch.dtype) -> None:
    """Replace linear layers by DeepSpeed's split ones and allocate all parameters on the device, not yet filled.

    Values of buffers are lost, and everything is cast to `dtype`: the caller puts right what must be otherwise.
    """
    split(model, world, dtype)
    allocate(model, device)


def split(model: PreTrainedModel, world: int, dtype: torch.dtype) -> None:
    """The first half of `shard`: parameters stay on the meta device, so that what is replaced is never allocated."""
    with _quiet(), _meta(model):
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        try:
            deepspeed.init_inference(
                model, tensor_parallel={"tp_size": world}, replace_with_kernel_inject=False, dtype=dtype
            )
        except (AssertionError, ValueError, RuntimeError) as error:
            raise LoadError(f"DeepSpeed cannot split {model.config.model_type}: {error}") from None


def allocate(model: nn.Module, device: torch.device) -> None:
    """The second half: places for all parameters that the model has by now. Values of buffers are lost."""
    model.to_empty(device=device)
    stray = next((name for name, value in model.named_parameters() if value.device.type != device.type), None)
    if stray is not None:
        raise LoadError(f"DeepSpeed put {stray!r} on {model.get_parameter(stray).device}, not on {device}")


@contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed prints what it replaces."""
    with redirect_stdout(StringIO()):
        yield


@contextmanager
def _meta(model: nn.Module) -> Iterator[None]:
    """DeepSpeed ends by allocating a model that is on the meta device; not meanwhile."""
    vars(model)["to_empty"] = lambda **_: model
    try:
        yield
    finally:
        del vars(model)["to_empty"]


def in_blocks(model: nn.Module) -> list[nn.Module]:
    """All modules of the repeated blocks: of lists of modules, as transformers holds its layers."""
    found = {
        id(inner): inner for outer in model.modules() if isinstance(outer, nn.ModuleList) for inner in outer.modules()
    }
    return list(found.values())


def spans(model: nn.Module, tied: bool) -> dict[str, Span]:
    """List this rank's part of every tensor that must be filled: parameters, and buffers that checkpoints hold."""
    found = dict.fromkeys(model.state_dict(), WHOLE)
    for path, module in model.named_modules():
        for name, span in layer_spans(module).items():
            found[f"{path}.{name}"] = span
        if isinstance(module, VocabParallelHead) and tied:
            del found[f"{path}.weight"]  # a view of the embedding
    return found


def layer_spans(module: nn.Module) -> dict[str, Span]:
    """List the parts of one layer's weight and bias, where they are not whole."""
    if isinstance(module, VocabParallelHead):
        rows = Span(0, module.rows.start, module.rows.stop)
        return {name: rows for name, _ in module.named_parameters()}
    if isinstance(module, PackedLinear):
        return module.spans
    kind, layer = kind_of(module), module
    if kind == "whole":
        return {}
    if kind == "columns":
        return {"weight": _share(layer, 1)}
    span = _share(layer, 0) if kind == "rows" else Span(cut=lambda whole: _cut(layer, whole))
    return {name: span for name, _ in layer.named_parameters(recurse=False)}


def kind_of(module: nn.Module) -> str:
    """How DeepSpeed split a layer: whole, rows, columns, or fused: rows by a rule of its own."""
    if isinstance(module, PackedLinear):
        return module.kind
    from deepspeed.module_inject import layers

    kinds = {layers.LinearLayer: "rows", layers.LinearAllreduce: "columns"}
    kinds |= {layers.fused_LinearLayer: "fused", layers.GateUpPack_LinearLayer: "fused"}
    if type(module) in kinds:
        return kinds[type(module)]
    if isinstance(module, layers.TensorParallel_Layer):
        raise LoadError(f"DeepSpeed used {type(module).__name__}, which is not supported")
    return "whole"


def _share(layer: Any, dimension: int) -> Span:
    sizes = layer._partition_sizes
    start = sum(sizes[: layer.tp_index])
    return Span(dimension, start, start + sizes[layer.tp_index])


def _cut(layer: Any, whole: torch.Tensor) -> torch.Tensor:
    """DeepSpeed's own cut of a fused weight or bias, applied to that one whole tensor on the host."""
    part = nn.Parameter(whole, requires_grad=False)
    keep = type(layer).keep_module_on_host
    type(layer).keep_module_on_host = True
    try:
        layer._tp_partition([part])
    finally:
        type(layer).keep_module_on_host = keep
    return part.data


def check_split(model: PreTrainedModel, world: int) -> None:
    """LoadError where DeepSpeed split nothing that should have been."""
    if world > 1 and not any(kind_of(module) == "columns" for module in model.modules()):
        raise LoadError(f"DeepSpeed split nothing of {model.config.model_type}")


def check_shards(model: PreTrainedModel, world: int) -> None:
    """LoadError unless what is split and what is whole fit together in every layer: else the text would be wrong."""
    check_split(model, world)
    if world == 1:
        return
    for path, module in model.named_modules():
        if any(kind_of(child) != "whole" for child in module.children()):
            _check_block(path, module)


def _check_block(path: str, block: nn.Module) -> None:
    """One attention or MLP: split inputs lead into outputs that are summed, with nothing whole between them."""
    kinds = {name: kind_of(child) for name, child in block.named_children()}
    split = {name: kind for name, kind in kinds.items() if kind != "whole"}
    columns = [name for name, kind in split.items() if kind == "columns"]
    whole = [name for name, child in block.named_children() if _is_whole(child)]
    if not columns or len(columns) == len(split) or whole:
        raise LoadError(f"DeepSpeed split {path} only in part: {', '.join(whole or kinds)}")
    widths = {_shape(block, name)[0] for name, kind in split.items() if kind != "columns"}
    widths |= {
        width // parts for width in widths for parts in (2, 3)
    }  # gate and up, or queries, keys and values, in one
    for name in columns:
        if _shape(block, name)[1] not in widths:
            raise LoadError(f"{path}.{name} takes {_shape(block, name)[1]} columns, which nothing beside it makes")
    _check_heads(path, block)


def _is_whole(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear or (isinstance(layer, PackedLinear) and layer.kind == "whole")


def _shape(block: nn.Module, name: str) -> tuple[int, ...]:
    weight = getattr(getattr(block, name, None), "weight", None)
    return tuple(weight.shape) if isinstance(weight, torch.Tensor | Packed) else ()


def _check_heads(path: str, block: nn.Module) -> None:
    """Attention: whole heads, as many queries to a key as the whole model has, and no norm over all heads."""
    queries, keys, size = _shape(block, "q_proj"), _shape(block, "k_proj"), getattr(block, "head_dim", None)
    if not queries or not keys or not isinstance(size, int):
        return
    (q, q_rest), (k, k_rest) = divmod(queries[0], size), divmod(keys[0], size)
    groups = getattr(block, "num_key_value_groups", 1)
    if q_rest or k_rest or k == 0 or q != k * groups:
        raise LoadError(f"{path}: {q} query and {k} key/value heads on this rank, the model has {groups} to 1")
    for name, child in block.named_children():
        shape = _shape(block, name)
        if len(shape) == 1 and shape[0] > size and kind_of(child) == "whole":
            raise LoadError(f"{path}.{name} spans all heads, which no rank has")
