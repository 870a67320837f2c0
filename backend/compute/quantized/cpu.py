"""Products with packed weights on CPU: some rows of the weight are made full at a time, in the processor's cache.

For few tokens in bfloat16 and int8 torch has a kernel that reads the codes themselves. Its kernels for float32 and
float16, and those for int4 in the order in which codes lie here, are slower than this (torch 2.13).
"""

from __future__ import annotations

import torch
from torch import Tensor

from backend.compute.quantized.packed import Packed, unpaired, widened

SLICE = 1 << 18
"""Elements of a weight that are full at a time."""
FEW = 32
"""Tokens up to which torch's kernel for int8 is the faster one."""


def product(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """[T, K] by [N, K] -> [T, N]"""
    found = x.new_empty(len(x), weight.shape[0])
    multiply = _by_kernel if len(x) <= FEW and _suits(x, weight) else _by_full
    for start, stop in weight.slices(SLICE):
        multiply(x, weight.rows(start, stop), found[:, start:stop])
    return found if bias is None else found.add_(bias)


def _suits(x: Tensor, weight: Packed) -> bool:
    """Whether torch's kernel takes it."""
    return weight.scheme.kind == "int8" and _rowwise(weight) and x.dtype == torch.bfloat16


def _rowwise(weight: Packed) -> bool:
    """Whether all that codes need is a scale a row."""
    return weight.scale.shape[1] == 1 and weight.offset is None and weight.order is None


def _by_kernel(x: Tensor, weight: Packed, place: Tensor) -> None:
    signed = (weight.codes ^ 128).view(torch.int8)
    place.copy_(torch._weight_int8pack_mm(x, signed, weight.scale[:, 0].to(x.dtype)))


def _by_full(x: Tensor, weight: Packed, place: Tensor) -> None:
    if _rowwise(weight) and x.dtype == torch.float32:
        torch.mm(x, _levels(weight).t(), out=place)
        place *= weight.scale[:, 0]
    else:
        torch.mm(x, weight.full().to(x.dtype).t(), out=place)


def _levels(weight: Packed) -> Tensor:
    """float32 [N, K], to be multiplied by each row's scale: one pass over the weight less than its full form takes."""
    if weight.scheme.kind == "fp8":
        return widened(weight.codes)
    codes = unpaired(weight.codes) if weight.scheme.bits == 4 else weight.codes
    return codes.float().sub_(1 << weight.scheme.bits - 1)
