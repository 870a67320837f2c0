"""float32 linear layers on CPUs by oneDNN, where MKL, which torch calls for them, leaves AVX-512 idle: not on Intel's.

On one core of a Zen 5, 512 tokens by 384 x 1536: 97 GFLOP/s by MKL, 230 by oneDNN. torch itself calls oneDNN for
bfloat16, and for float32 in what it compiles.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as torchs

from backend.compute.tensor_parallel import VocabParallelHead
from backend.devices import cpu_vendor

LEAST = 1 << 20
"""Multiplications of a product below which MKL is as fast."""


def pays(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this dtype are faster by oneDNN."""
    if device.type != "cpu" or dtype != torch.float32 or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and cpu_vendor() != "GenuineIntel"


def install(model: nn.Module) -> int:
    """Let every float32 linear layer that DeepSpeed left whole, and the output head, be computed so; how many."""
    layers: list[Any] = [module for module in model.modules() if type(module) in (nn.Linear, VocabParallelHead)]
    layers = [layer for layer in layers if layer.weight.dtype == torch.float32]
    for layer in layers:
        if isinstance(layer, VocabParallelHead):
            vars(layer)["project"] = linear
        else:
            layer.forward = MethodType(_forward, layer)
    return len(layers)


def _forward(layer: Any, source: Tensor) -> Tensor:
    return linear(source, layer.weight, layer.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As torch's.  # [..., K] by [N, K] -> [..., N]"""
    if x.numel() * weight.shape[0] < LEAST:
        return torchs(x, weight, bias)
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], None)
    return found
