"""RMS norms of a model computed by one kernel each; it does not know where they stand.

A norm is known by what it does: its own forward, tried on random input, must give the root-mean-square norm times its
weight, or times one more than its weight (Gemma).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from backend.compute.dense.base import ops

_EPSILON = ("variance_epsilon", "eps", "epsilon")
_CLOSE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Relative differences that rounding makes, by type."""


@dataclass(frozen=True, eq=False)
class Norm:
    """y = x / rms(x) * weight."""

    weight: Tensor  # [width]
    eps: float


def recognised(module: Any) -> Norm | None:
    """What `module` computes, if that is an RMS norm over its input's last dimension."""
    weight = getattr(module, "weight", None)
    eps = next((getattr(module, name) for name in _EPSILON if isinstance(getattr(module, name, None), float)), None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or eps is None or getattr(module, "bias", None) is not None:
        return None
    for norm in (Norm(weight, eps), Norm(weight.float() + 1, eps)):
        if _same(module, norm, weight):
            return norm
    return None


def _same(module: nn.Module, norm: Norm, like: Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)
    tried = (torch.randn(4, len(like), generator=generator) * 3 + 0.5).to(like.device, like.dtype)
    want = module(tried)
    found = ops(like.device.type).normed(tried, None, norm.weight, norm.eps)
    if want.shape != found.shape or want.dtype != found.dtype:
        return False
    return bool((want - found).abs().max() <= _CLOSE[like.dtype] * want.abs().max())


def replace(model: nn.Module) -> int:
    """Let every RMS norm of the model be one kernel; how many there are."""
    found = 0
    for module in model.modules():
        if not list(module.children()) and (norm := recognised(module)):
            module.forward = _Normed(norm)  # as its caller calls it
            found += 1
    return found


class _Normed:
    """Stands for a norm's forward.  # [..., width] -> [..., width]"""

    def __init__(self, norm: Norm) -> None:
        self._norm = norm

    def __call__(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        return ops(hidden.device.type).normed(rows, None, self._norm.weight, self._norm.eps).view(hidden.shape)
