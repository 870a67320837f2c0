"""Puts packed layers in the place of the linear layers of a model's repeated blocks, still empty; it fills nothing.

Embeddings, norms, the output head and what stands outside the blocks stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from backend.compute.quantized.layer import Join, PackedLinear
from backend.compute.quantized.packed import Packed, Scheme
from backend.compute.quantized.scheme import check_width
from backend.compute.sharding import in_blocks, kind_of, layer_spans
from backend.errors import LoadError
from backend.quantized_form import SCATTERED


def replace(
    model: nn.Module, scheme: Scheme | Mapping[str, Scheme], dtypes: Mapping[str, torch.dtype], device: torch.device
) -> int:
    """Pack every linear layer of the repeated blocks, or those of them that are named; how many.

    The model's own parameters may be on the meta device.

    LoadError names a matrix in the blocks that is not a linear layer's: the model would be larger than was asked for.
    """
    blocks, names = in_blocks(model), {id(module): name for name, module in model.named_modules()}
    linear = {names[id(module)]: module for module in blocks if _is_linear(module)}
    if not isinstance(scheme, Scheme):
        linear = {name: module for name, module in linear.items() if name in scheme}
    for name, module in linear.items():
        owner, _, leaf = name.rpartition(".")
        own = scheme if isinstance(scheme, Scheme) else scheme[name]
        packed = _packed(name, module, own, dtypes.get(f"{name}.weight", torch.float32), device)
        setattr(model.get_submodule(owner), leaf, packed)
    if isinstance(scheme, Scheme):
        _check_rest(model)
    if not linear:
        raise LoadError(f"quantization: {type(model).__name__} has no linear layers in repeated blocks")
    return len(linear)


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or (kind_of(module) != "whole" and not getattr(module, "gather_output", False))


def _packed(name: str, layer: Any, scheme: Scheme, dtype: torch.dtype, device: torch.device) -> PackedLinear:
    rows, columns = layer.weight.shape
    spans, kind = layer_spans(layer), kind_of(layer)
    start, stop, width = 0, columns, columns
    if kind == "columns":
        start, stop, width = spans["weight"].start, spans["weight"].stop, sum(layer._partition_sizes)
    check_width(name, scheme, width, start, stop)
    weight = Packed.empty(scheme, rows, columns, dtype, device)
    split = kind == "columns" and layer.tp_world_size > 1
    if split and scheme.ordered:
        raise LoadError(SCATTERED)
    if split and not scheme.group:
        weight = weight.agreed(_agree)
    return PackedLinear(weight, layer.bias, kind, spans, _join(layer) if split else None)


def _agree(own: Tensor, how: str) -> Tensor:
    dist.all_reduce(own, {"max": dist.ReduceOp.MAX, "sum": dist.ReduceOp.SUM}[how])
    return own


def _join(layer: Any) -> Join:
    from deepspeed.comm import inference_all_reduce

    group = layer.mp_group
    return lambda found: inference_all_reduce(found, group=group)


def _check_rest(model: nn.Module) -> None:
    names = {id(module): name for name, module in model.named_modules()}
    for module in in_blocks(model):
        large = [name for name, value in module.named_parameters(recurse=False) if value.dim() > 1]
        if large and not isinstance(module, nn.Embedding):
            raise LoadError(
                f"quantization: {names[id(module)]}.{large[0]} is not a linear layer's, and would stay as it is"
            )
