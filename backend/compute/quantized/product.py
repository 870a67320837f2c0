"""The product with a weight that may be packed, on the device where it lies."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from backend.compute.quantized import cpu
from backend.compute.quantized.packed import Packed


def product(x: Tensor, weight: Tensor | Packed, bias: Tensor | None) -> Tensor:
    """As torch's linear.  # [..., K] by [N, K] -> [..., N]"""
    if isinstance(weight, Tensor):
        return linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    if weight.device.type == "cuda":
        from backend.compute.dense import packed  # OpenAI Triton, which CPU ranks may lack

        found = packed.product(rows, weight, bias)
    else:
        found = cpu.product(rows, weight, bias)
    return found.view(*x.shape[:-1], weight.shape[0])
