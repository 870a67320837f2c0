"""The dense operations in plain torch, for any device: what every kernel is checked against; no model knowledge.

Matrix products are torch's own in the dtype of their input, so a 16-bit linear rounds after its norm and product too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from backend.compute.cache import rounded, write
from backend.compute.dense.base import Norm, known
from backend.compute.quantized.packed import Packed

GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def few(weight: Tensor | Packed) -> int:
    """As kernels.py has it: models are tried on both sides."""
    return 16


def normed(hidden: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    if update is not None:
        hidden += update
    return (_scaled(hidden.float(), eps) * weight.float()).to(hidden.dtype)


def _scaled(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def roped(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv: Tensor,
    slots: Tensor,
    heads: int,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
) -> Tensor:
    kv_heads, dim = kv.shape[3:]
    q, k, v = qkv.view(len(qkv), heads + 2 * kv_heads, dim).split([heads, kv_heads, kv_heads], 1)
    q, k = q.float(), k.float()
    if norms is not None:
        q, k = _scaled(q, eps) * norms[0].float(), _scaled(k, eps) * norms[1].float()
    write(kv.view(-1, 2, kv_heads, dim), slots, rounded(_rotated(k, cos, sin), kv.dtype), rounded(v, kv.dtype))
    return _rotated(q, cos, sin).to(qkv.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """float32 [T, heads, D]; pairs (i, i + R/2) turn by the angle of cos and sin [T, R]."""
    turning, rest = x[..., : cos.shape[1]], x[..., cos.shape[1] :]
    first, second = turning.chunk(2, -1)
    across = torch.cat([-second, first], -1)
    return torch.cat([turning * cos.float()[:, None] + across * sin.float()[:, None], rest], -1)


def gated(gate_up: Tensor, activation: str) -> Tensor:
    gate, up = gate_up.float().chunk(2, -1)
    return (GATES[known(activation)](gate) * up).to(gate_up.dtype)


def linear(
    x: Tensor,
    weight: Tensor | Packed,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: Norm | None,
    activation: str | None,
) -> Tensor:
    if norm is not None:
        x = normed(x, None, *norm)
    found = product(x, weight, bias)
    if activation is not None:
        found = gated(found, activation)
    return found if residual is None else residual.add_(found)


def product(x: Tensor, weight: Tensor | Packed, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.full() if isinstance(weight, Packed) else weight, bias)


def best(logits: Tensor) -> tuple[Tensor, Tensor]:
    """torch.max leaves open which of several equal values it points at; the first is looked for."""
    values = logits.float().amax(1)  # NaN wins
    top = torch.where(values.isnan()[:, None], logits.isnan(), logits == values[:, None])
    ids = torch.arange(logits.shape[1], device=logits.device)
    return values, torch.where(top, ids, logits.shape[1]).amin(1)
