"""Gated activations as OpenAI-Triton code: a kernel over a merged projection's result, and the function in it."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from backend.compute.dense.base import known

BLOCK = 1024


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """See base.Ops."""
    assert gate_up.is_contiguous()
    tokens, width = len(gate_up), gate_up.shape[1] // 2
    output = torch.empty(tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    _gate_kernel[(tokens, triton.cdiv(width, BLOCK))](
        output, gate_up, WIDTH=width, BLOCK=BLOCK, ACTIVATION=known(activation)
    )
    return output


@triton.jit
def _gate_kernel(output, gate_up, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < WIDTH
    gate = tl.load(gate_up + token * 2 * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (token * 2 + 1) * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
    result = activated(gate, ACTIVATION) * up
    tl.store(output + token * WIDTH + at, result.to(output.dtype.element_ty), mask=inside)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """float32 -> float32; the names are base.ACTIVATIONS."""
    if ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_pytorch_tanh":
        # 1 + tanh(u) = 2 / (1 + exp(-2u))
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        tl.static_assert(ACTIVATION == "relu")
        return tl.where(x < 0.0, 0.0, x)  # NaN stays NaN
