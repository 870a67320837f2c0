"""Sibling projections of one input computed as one matrix product; it does not know the model around them.

The siblings stay where they are and keep their names and weights, so the model's code and the loader see no difference.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
from torch import nn

from backend.compute.quantized.layer import PackedLinear
from backend.compute.quantized.packed import Packed, joined
from backend.compute.quantized.product import product

Weight = torch.Tensor | Packed

GROUPS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Names of siblings that take the same input, in the order in which models call them."""


def pays(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether merging is faster: on CUDA fewer launches; on CPU 6-11 % in bf16, nothing in fp32 (SmolLM2)."""
    return device.type == "cuda" or dtype != torch.float32


class _Group:
    """Projections with one merged weight, and the outputs of the last input that are not yet taken."""

    def __init__(self, parts: list[nn.Module]) -> None:
        weights = [_weight(part) for part in parts]
        self.sizes = [weight.shape[0] for weight in weights]
        self.weight = _merge(weights)  # [all rows, input], packed if they are
        self.bias = None if parts[0].bias is None else _merge([_tensor(part, "bias") for part in parts])
        self.source: torch.Tensor | None = None
        self.outputs: list[torch.Tensor | None] = []

    def compute(self, source: torch.Tensor) -> None:
        merged = product(source, self.weight, self.bias)  # [..., all rows]
        self.outputs = list(merged.split(self.sizes, dim=-1))
        self.source = source

    def take(self, index: int, source: torch.Tensor) -> torch.Tensor:
        output = self.outputs[index] if self.source is source else None
        if output is None:
            raise RuntimeError(f"merged projection {index} was called out of order, twice, or with another input")
        self.outputs[index] = None
        if index == len(self.sizes) - 1:
            self.source = None
        return output


class MergedPart(nn.Module):
    """One of the merged projections. The first computes for all; the others hand out what it left for them."""

    def __init__(self, group: _Group, index: int, weight: Weight, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.group, self.index = group, index
        self.weight = _kept(weight)  # [rows, input], a view of the merged one
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = weight.shape

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        """This part's output. RuntimeError if it is not its turn or the input is not the first part's.

        # [..., input] -> [..., rows]
        """
        if self.index == 0:
            self.group.compute(source)
        return self.group.take(self.index, source)


def merge(model: nn.Module) -> int:
    """Merge every group that `model` has; the number of groups merged.

    Weights move into the merged ones, one group at a time, and the siblings' become views: no second copy stays.
    """
    merged = 0
    for parent in list(model.modules()):
        for names in GROUPS:
            parts = [getattr(parent, name, None) for name in names]
            if all(isinstance(part, nn.Module) for part in parts) and _alike(parts):  # type: ignore[arg-type]
                _replace(parent, names, parts)  # type: ignore[arg-type]
                merged += 1
    return merged


def _alike(parts: list[nn.Module]) -> bool:
    """Whether these are plain linear layers (torch's or DeepSpeed's row split) of one input width and dtype."""
    if len({type(part) for part in parts}) > 1 or not _plain(parts[0]):
        return False
    weights = [_weight(part) for part in parts]
    same = {
        (
            type(weight),
            weight.shape[1:],
            weight.dtype,
            weight.device,
            getattr(weight, "scheme", None),
            part.bias is None,
        )
        for weight, part in zip(weights, parts, strict=True)
    }
    return len(same) == 1


def _plain(part: nn.Module) -> bool:
    if type(part) is nn.Linear:
        return True
    if isinstance(part, PackedLinear):
        return part.kind != "columns" and not part.weight.scheme.ordered
    return type(part).__name__ == "LinearLayer" and not getattr(part, "gather_output", True)


def _replace(parent: nn.Module, names: tuple[str, ...], parts: list[nn.Module]) -> None:
    group = _Group(parts)
    biases = [None] * len(parts) if group.bias is None else list(group.bias.split(group.sizes))
    for index, (name, weight) in enumerate(zip(names, _split(group.weight, group.sizes), strict=True)):
        setattr(parent, name, MergedPart(group, index, weight, biases[index]))


def _kept(weight: Weight) -> nn.Parameter | Packed:
    return weight if isinstance(weight, Packed) else nn.Parameter(weight, requires_grad=False)


def _weight(part: nn.Module) -> Weight:
    value = part.weight
    return value if isinstance(value, Packed) else _tensor(part, "weight")


def _tensor(part: nn.Module, name: str) -> torch.Tensor:
    value = getattr(part, name)
    assert isinstance(value, torch.Tensor)
    return value.detach()


def _merge(parts: list[Any]) -> Any:
    """Packed ones are not yet filled: places are all that is needed."""
    return joined(parts) if isinstance(parts[0], Packed) else torch.cat(parts, dim=0)


def _split(weight: Weight, sizes: list[int]) -> list[Weight]:
    if isinstance(weight, Packed):
        ends = list(accumulate(sizes))
        return [weight.rows(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    return list(weight.split(sizes))
