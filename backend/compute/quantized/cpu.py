"""Products with packed weights on CPU: some rows of the weight are made full at a time, in the processor's cache."""

from __future__ import annotations

import torch
from torch import Tensor

from backend.compute.quantized.packed import Packed

SLICE = 1 << 18
"""Elements of a weight that are full at a time."""


def product(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """[T, K] by [N, K] -> [T, N]"""
    found = x.new_empty(len(x), weight.shape[0])
    for start, stop in weight.slices(max(SLICE, len(x) * weight.shape[1])):
        torch.mm(x, weight.rows(start, stop).full().to(x.dtype).t(), out=found[:, start:stop])
    return found if bias is None else found.add_(bias)


def prepared(weight: Packed) -> Packed:
    return weight
