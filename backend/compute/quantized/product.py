"""The product with a weight that may be packed, on the device where it lies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from backend.compute.quantized import cpu
from backend.compute.quantized.packed import AT_ONCE, Packed

_plain = ContextVar("plain", default=False)


@contextmanager
def plainly(plain: bool = True) -> Iterator[None]:
    """Meanwhile packed weights are made full for torch's own product: what every kernel for them is checked against."""
    token = _plain.set(plain)
    try:
        yield
    finally:
        _plain.reset(token)


def product(x: Tensor, weight: Tensor | Packed, bias: Tensor | None) -> Tensor:
    """As torch's linear.  # [..., K] by [N, K] -> [..., N]"""
    if isinstance(weight, Tensor):
        return linear(x, weight, bias)
    if _plain.get():
        return _by_full(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    if weight.device.type == "cuda":
        from backend.compute.dense import packed  # OpenAI Triton, which CPU ranks may lack

        found = packed.product(rows, weight, bias)
    else:
        found = cpu.product(rows, weight, bias)
    return found.view(*x.shape[:-1], weight.shape[0])


def _by_full(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """Some rows of the weight full at a time: beside a served model there is little memory left."""
    parts = [linear(x, weight.rows(*each).full().to(x.dtype)) for each in weight.slices(AT_ONCE)]
    found = torch.cat(parts, -1)
    return found if bias is None else found.add_(bias)
